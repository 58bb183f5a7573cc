// A mixture of experts: each row of x meets the matrix of the expert that it goes to.
#pragma once

#include <cstdint>

#include "products.h"
#include "weight.h"

namespace blockpress {

struct ExpertProducts {
  Weight weight;       // the matrices of all experts, one below the other
  int64_t expert_rows; // of each of them: a multiple of kStripRows that divides those of `weight`
  const float* x;      // (rows, columns)
  int64_t rows;
  bool rounded;           // whether x is first rounded to int8
  const int64_t* experts; // (rows), which may hold any numbers
  float* y;               // (rows, expert_rows)
};

// Computes them all; null where all is well, an error where an expert's number is none of theirs.
ort::Status* MultiplyExperts(const Kernels& kernels, const ExpertProducts& products, Host* host);

} // namespace blockpress
