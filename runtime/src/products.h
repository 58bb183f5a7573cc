// Products of rows of x with packed matrices, cut into tasks for threads.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels.h"
#include "ort_abi.h"
#include "weight.h"

namespace blockpress {

// Threads and errors: those of ONNX Runtime, or of the driver.
class Host {
 public:
  // Calls task(argument, i) for i from 0 to count - 1, in any order, and returns after the last; null where all is well.
  virtual ort::Status* ForEach(void (*task)(void*, size_t), size_t count, void* argument) = 0;

  // The error that says this.
  virtual ort::Status* Fail(ort::ErrorCode code, const char* message) = 0;

 protected:
  ~Host() = default;
};

// Some rows of the products' order times one matrix.
struct Product {
  Weight weight;
  int64_t first, rows;
  float* y;       // (rows, weight.rows), as the kernels write it
  float* ordered; // y of all rows as x has them, where these are copied to; null where y is their place
};

struct Products {
  const float* x; // (rows, columns)
  int64_t rows;
  int64_t columns; // of every matrix
  bool rounded;    // whether x is first rounded to int8
  const int64_t* order; // (rows): which row of x each row is; null where they are as in x
  const Product* of;
  int64_t count;
};

// Computes them all; null where all is well. Each output is one thread's, so that threads do not change a bit.
ort::Status* Multiply(const Kernels& kernels, const Products& products, Host* host);

} // namespace blockpress
