// Memory for one run, aligned for vectors.
#pragma once

#include <cstdint>
#include <cstdlib>

namespace blockpress {

class Buffer {
 public:
  Buffer() = default;
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { std::free(memory_); }

  // Null where there is no memory, or where `count` elements are more bytes than 64 bits count. Once for each buffer.
  template <typename T>
  T* Allocate(int64_t count) {
    constexpr int64_t kLimit = INT64_MAX / 2 / static_cast<int64_t>(sizeof(T));
    if (count > kLimit) return nullptr;
    memory_ = std::malloc(static_cast<size_t>(count) * sizeof(T) + kAlignment);
    if (memory_ == nullptr) return nullptr;
    const auto address = reinterpret_cast<uintptr_t>(memory_);
    return reinterpret_cast<T*>((address + kAlignment - 1) / kAlignment * kAlignment);
  }

  // The same for `rows` rows of `stride` elements and `more` behind them.
  template <typename T>
  T* AllocateRows(int64_t rows, int64_t stride, int64_t more = 0) {
    return rows > (INT64_MAX - more) / stride ? nullptr : Allocate<T>(rows * stride + more);
  }

 private:
  static constexpr size_t kAlignment = 64;
  void* memory_ = nullptr;
};

} // namespace blockpress
