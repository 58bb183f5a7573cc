// What every instruction set implements, and the choice between them at run time.
#pragma once

#include <cstdint>

#include "attention.h"
#include "weight.h"

namespace blockpress {

struct Kernels {
  const char* name; // "scalar", "avx2", "avx2-128", "avx512", "neon"

  // Rows 16 * first_strip up to 16 * last_strip (not beyond W's last) of y (X.rows, W.rows) = X Wᵀ + bias, row-major.
  // `quantized` activations only with int8 and int4 values.
  void (*multiply)(const Weight& weight, const Activations& activations, int64_t first_strip, int64_t last_strip,
                   float* y);

  // Rounds x (columns) to int8: returns the step max|x| / 127 (1 where that is 0; NaN where x is not finite, and
  // then writes zeros). Writes `stride` elements, zeros from `columns` on.
  float (*quantize)(const float* x, int64_t columns, int64_t stride, int8_t* quantized);

  // Puts `stride` rounded columns, whole pieces, in the order in which `multiply` takes them.
  void (*arrange)(int8_t* quantized, int64_t stride);

  // Whether `multiply` needs `transposed` for these.
  bool (*wants_transposed)(const Weight& weight, const Activations& activations);

  // Calculates y of the task's rows, or its part of the softmax (attention.h).
  void (*attend)(const Attention& attention, const AttentionTask& task);

  // Up to how many rounded rows `multiply` takes from `widened`, for int8 values of packed weights.
  int64_t widened_rows;
};

void AttendScalar(const Attention& attention, const AttentionTask& task);
extern const Kernels kScalarKernels;
#if defined(BLOCKPRESS_X86)
extern const Kernels kAvx2Kernels;       // AVX2, FMA, F16C, BMI, BMI2
extern const Kernels kNarrowAvx2Kernels; // the same for units of 128 bits
extern const Kernels kAvx512Kernels;     // AVX-512 F, BW, DQ, VL, VBMI2, VNNI
#endif
#if defined(BLOCKPRESS_ARM64) || defined(BLOCKPRESS_EMULATED_NEON)
extern const Kernels kNeonKernels; // NEON with the dot product
#endif

// The best that this machine runs, or what the environment variable BLOCKPRESS_RUNTIME_ISA names (scalar, avx2,
// avx2-128, avx512, neon); a name that this machine cannot run, or that is unknown, is null and `BestKernels` sets `error`.
const Kernels* BestKernels(const char** error);

} // namespace blockpress
