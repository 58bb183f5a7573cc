// The values that a cursor takes, for instruction sets that put bytes at their columns by table lookups. Beside what
// loops.h lists, an instruction set gives
//   LoadBytes(p)           a vector of int8 from memory
//   UnpackInt4(from, to)   32 bytes of int4 values as 64 of int8
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "loops.h"

namespace blockpress {

// int4 values are first unpacked to int8, many ahead, and then go the way of int8.
template <class Isa> class UnpackedInt4 {
  static constexpr int64_t kAhead = 1024;

public:
  struct Scratch {
    alignas(32) int8_t values[kAhead + 4 * kPieceColumns];
  };
  UnpackedInt4(const uint8_t* values, const uint8_t* end, Scratch* scratch)
      : next_(values), packed_end_(end), scratch_(scratch->values), current_(scratch_), end_(scratch_) {}

  // Unpacks on, where the values of the next two pieces are not there yet.
  void Prepare() {
    if (end_ - current_ < 2 * kPieceColumns) Unpack();
  }
  // The int8 values from the current piece on.
  const uint8_t* Current() const { return reinterpret_cast<const uint8_t*>(current_); }
  // Moves on from a piece of `count` values.
  void Skip(int64_t count) { current_ += (count + 1) / 2 * 2; }
  const uint8_t* values() const { return next_ - (end_ - current_) / 2; }

private:
  void Unpack() {
    const int64_t left = end_ - current_; // less than two pieces
    for (int64_t i = 0; i < 2 * kPieceColumns; i += Isa::kBytes)
      Isa::StoreBytes(scratch_ + i, Isa::LoadBytes(current_ + i));
    current_ = scratch_;
    end_ = scratch_ + left;
    const int64_t bytes = std::min(kAhead / 2, packed_end_ - next_);
    for (int64_t i = 0; i < bytes; i += 32) {
      Isa::Fetch(next_ + kValuesAhead + i);
      Isa::UnpackInt4(next_ + i, end_ + 2 * i);
    }
    next_ += bytes;
    end_ += 2 * bytes;
  }

  const uint8_t* next_; // what is not unpacked yet
  const uint8_t* packed_end_;
  int8_t* scratch_;
  int8_t* current_;
  int8_t* end_; // of what is unpacked
};

// Other values lie in the tensor as they are.
template <class Isa, ValueType type> class StoredValues {
public:
  struct Scratch {};
  StoredValues(const uint8_t* values, const uint8_t*, Scratch*) : values_(values) {}
  // Asks the memory for what comes later.
  void Prepare() const { FetchValues<Isa, type>(values_); }
  const uint8_t* Current() const { return values_; }
  void Skip(int64_t count) { values_ += count * ElementBytes(type); }
  const uint8_t* values() const { return values_; }

private:
  const uint8_t* values_;
};

template <class Isa, ValueType type>
using Values = std::conditional_t<type == ValueType::kInt4, UnpackedInt4<Isa>, StoredValues<Isa, type>>;

// Of a piece with so many values.
template <ValueType type> constexpr int64_t PieceBytes(int64_t count) {
  return type == ValueType::kInt4 ? (count + 1) / 2 : count * ElementBytes(type);
}

} // namespace blockpress
