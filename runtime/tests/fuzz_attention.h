// Attention of random shapes against sums in double; see driver.cpp.
#pragma once

#include <string>

#include "fuzz_tools.h"
#include "kernels.h"

namespace blockpress {

// Runs attention on one random set of inputs, which may be damaged; returns what is wrong, or nothing. `worst` is the
// largest error so far, in parts of what the sizes of the terms allow.
std::string CompareAttention(Random& random, const Kernels& kernels, double* worst);

} // namespace blockpress
