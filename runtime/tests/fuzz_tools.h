// What all parts of the driver use.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <random>
#include <vector>

#include "products.h"

namespace blockpress {

constexpr double kTolerance = 1e-6; // of the sum of the sizes of a product's terms
constexpr float kUntouched = 12345.5f;

using Random = std::mt19937_64;

inline int64_t Between(Random& random, int64_t low, int64_t high) {
  return std::uniform_int_distribution<int64_t>(low, high)(random);
}

inline float Normal(Random& random) { return std::normal_distribution<float>()(random); }

// Memory of exactly `bytes`, at an address that is a multiple of `alignment` and, mostly, of nothing more.
class Block {
 public:
  Block(Random& random, size_t bytes, size_t alignment)
      : shift_(alignment * static_cast<size_t>(Between(random, 0, 15))), memory_(new uint8_t[shift_ + bytes]()) {}

  template <typename T>
  T* as() const {
    return reinterpret_cast<T*>(memory_.get() + shift_);
  }

 private:
  size_t shift_;
  std::unique_ptr<uint8_t[]> memory_;
};

// One thread, which takes the tasks in any order.
class OneThread final : public Host {
 public:
  explicit OneThread(Random& random) : random_(random) {}
  ort::Status* ForEach(void (*task)(void*, size_t), size_t count, void* argument) override {
    std::vector<size_t> indices(count);
    for (size_t i = 0; i < count; ++i) indices[i] = i;
    std::shuffle(indices.begin(), indices.end(), random_);
    for (size_t i : indices) task(argument, i);
    return nullptr;
  }
  ort::Status* Fail(ort::ErrorCode, const char*) override { return reinterpret_cast<ort::Status*>(this); }

 private:
  Random& random_;
};

} // namespace blockpress
