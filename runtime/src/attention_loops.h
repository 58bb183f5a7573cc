// Attention of one task, written once for every vector instruction set. Beside Floats, kFloats and its arithmetic
// (loops.h), an instruction set `Isa` gives
//   Larger(a, b)           the larger of each; b where one of them is NaN
//   PowerOfTwo(n)          two to the power of n, whole numbers from -127 (which gives 0) to 127
//   CopyAround(from, count, to)  copies floats past the caches, where it can
//
// One or two rows go key by key, with sums over the columns of a head. More rows are the lanes of vectors, so that a key's
// column meets all of them at once: the queries, the scores and the sums of values are kept with their rows beside each
// other, and keys and values are read where they lie.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>

#include "attention.h"
#include "target.h"

namespace blockpress {

constexpr float kLowest = std::numeric_limits<float>::lowest();

// e to the power of v, at most 0 or NaN: 0 below -88. Two to a whole number times the Taylor series of what is left, at
// most half of log 2, whose first missing term is 5e-9.
template <class Isa> BLOCKPRESS_INLINE typename Isa::Floats Exp(typename Isa::Floats v) {
  using Floats = typename Isa::Floats;
  constexpr float kRounding = 12582912.0f; // 3 * 2^22: what is added to it loses its fraction
  const Floats x = Isa::Larger(Isa::Fill(-88.02969f), v); // -127 log 2
  const Floats rounding = Isa::Fill(kRounding);
  const Floats n = Isa::Minus(Isa::Fma(x, Isa::Fill(1.44269504f), rounding), rounding);
  Floats r = Isa::Fma(n, Isa::Fill(-0.693359375f), x); // log 2 in two parts, of which the first has few bits
  r = Isa::Fma(n, Isa::Fill(2.12194440e-4f), r);
  Floats series = Isa::Fill(1.0f / 5040);
  for (float factorial : {720.0f, 120.0f, 24.0f, 6.0f, 2.0f}) {
    series = Isa::Fma(series, r, Isa::Fill(1.0f / factorial));
  }
  series = Isa::Fma(series, r, Isa::Fill(1.0f));
  series = Isa::Fma(series, r, Isa::Fill(1.0f));
  return Isa::Times(series, Isa::PowerOfTwo(n));
}

// The keys and values of a task, tile by tile.
template <class Isa> class TaskTiles {
public:
  TaskTiles(const Attention& attention, const AttentionTask& task)
      : attention_(attention), task_(task), of_(attention, task.batch, task.key_head) {}

  // Calls use(first key, number of keys, keys, values) for each tile, once it is in the cache that leaves.
  template <class Use> void Each(Use use) const {
    const int64_t width = attention_.key_width, value_width = attention_.value_width;
    for (int64_t key = task_.first_key; key < task_.last_key; key += kTileKeys) {
      const int64_t last = std::min(key + kTileKeys, task_.last_key), count = last - key;
      if (task_.extends && last <= attention_.past) {
        CopyAround(of_.past_keys + key * width, count * width, of_.keys + key * width);
        CopyAround(of_.past_values + key * value_width, count * value_width, of_.values + key * value_width);
        use(key, count, of_.past_keys + key * width, of_.past_values + key * value_width);
        continue;
      }
      if (task_.extends) ExtendCache(attention_, task_.batch, task_.key_head, key, last);
      use(key, count, of_.keys + key * width, of_.values + key * value_width);
    }
  }

private:
  // What comes after this token sees the copy too late to find it in a cache of the processor.
  static void CopyAround(const float* past, int64_t count, float* present) {
    if (past != present) Isa::CopyAround(past, count, present);
  }

  const Attention& attention_;
  const AttentionTask& task_;
  const HeadCache of_;
};

// c (Rows, lanes) = a b, or c + a b: rows of a lie `row_step` apart and its columns `step`, those of b (depth, lanes) and c
// beside each other.
template <class Isa, int Rows, int Vectors>
BLOCKPRESS_NOINLINE void MultiplyLanes(const float* a, int64_t row_step, int64_t step, int64_t depth, const float* b,
                                       float* c, bool adds) {
  using Floats = typename Isa::Floats;
  constexpr int64_t kLanes = Vectors * Isa::kFloats;
  Floats sums[Rows][Vectors];
  for (int r = 0; r < Rows; ++r)
    for (int i = 0; i < Vectors; ++i) sums[r][i] = adds ? Isa::Load(c + r * kLanes + i * Isa::kFloats) : Isa::Zero();
  for (; depth > 0; --depth, a += step, b += kLanes) {
    Floats bs[Vectors];
    for (int i = 0; i < Vectors; ++i) bs[i] = Isa::Load(b + i * Isa::kFloats);
    for (int r = 0; r < Rows; ++r) {
      const Floats factor = Isa::Fill(a[r * row_step]);
      for (int i = 0; i < Vectors; ++i) sums[r][i] = Isa::Fma(factor, bs[i], sums[r][i]);
    }
  }
  for (int r = 0; r < Rows; ++r)
    for (int i = 0; i < Vectors; ++i) Isa::Store(c + r * kLanes + i * Isa::kFloats, sums[r][i]);
}

// The same for any number of rows.
template <class Isa, int Vectors>
inline void MultiplyAllLanes(const float* a, int64_t rows, int64_t row_step, int64_t step, int64_t depth,
                             const float* b, float* c, bool adds) {
  constexpr int kRows = Vectors == 1 ? 8 : 6; // as many sums as registers hold beside the factors
  constexpr int64_t kLanes = Vectors * Isa::kFloats;
  int64_t row = 0;
  for (; row + kRows <= rows; row += kRows)
    MultiplyLanes<Isa, kRows, Vectors>(a + row * row_step, row_step, step, depth, b, c + row * kLanes, adds);
  for (; row + 2 <= rows; row += 2)
    MultiplyLanes<Isa, 2, Vectors>(a + row * row_step, row_step, step, depth, b, c + row * kLanes, adds);
  if (row < rows) MultiplyLanes<Isa, 1, Vectors>(a + row * row_step, row_step, step, depth, b, c + row * kLanes, adds);
}

// A task whose rows are the lanes of `Vectors` vectors, or of several such groups.
template <class Isa, int Vectors> class LaneTask {
  using Floats = typename Isa::Floats;
  static constexpr int64_t kLanes = Vectors * Isa::kFloats;

public:
  LaneTask(const Attention& attention, const AttentionTask& task)
      : attention_(attention), task_(task), groups_((task.rows + kLanes - 1) / kLanes) {
    const int64_t rows = groups_ * kLanes;
    queries_ = task.memory;
    sums_ = queries_ + rows * attention.key_width;
    largest_ = sums_ + rows * attention.value_width;
    totals_ = largest_ + rows;
    scores_ = totals_ + rows;
  }

  void Run() {
    Begin();
    TaskTiles<Isa>(attention_, task_).Each([&](int64_t key, int64_t count, const float* keys, const float* values) {
      for (int64_t group = 0; group < groups_; ++group) AddTile(group, key, count, keys, values);
    });
    for (int64_t row = 0; row < task_.rows; ++row) Finish(row);
  }

private:
  // The rows of a group that are not only there to fill its lanes.
  int64_t RowsOf(int64_t group) const { return std::min(kLanes, task_.rows - group * kLanes); }

  void Begin() {
    const int64_t rows = groups_ * kLanes, width = attention_.key_width;
    std::fill_n(queries_, rows * width, 0.0f);
    std::fill_n(sums_, rows * attention_.value_width, 0.0f);
    std::fill_n(largest_, rows, kLowest);
    std::fill_n(totals_, rows, 0.0f);
    for (int64_t row = 0; row < task_.rows; ++row) {
      const TaskRow at(attention_, task_, row);
      float* out = queries_ + row / kLanes * kLanes * width + row % kLanes;
      Rotate(attention_, task_.batch, at.token, at.query(attention_, task_.batch), attention_.scale, out, kLanes);
    }
  }

  // What the mask says of a tile for all rows of a group.
  MaskTile TileOf(int64_t group, int64_t key) const {
    bool zero = true, hidden = true;
    for (int64_t row = group * kLanes; row < group * kLanes + RowsOf(group); ++row) {
      const int64_t mask_row = TaskRow(attention_, task_, row).mask_row(attention_, task_.batch);
      const MaskTile tile = attention_.tiles[mask_row * attention_.tiles_per_row() + key / kTileKeys];
      zero = zero && tile == MaskTile::kZero;
      hidden = hidden && tile == MaskTile::kHidden;
    }
    return zero ? MaskTile::kZero : hidden ? MaskTile::kHidden : MaskTile::kMixed;
  }

  void AddTile(int64_t group, int64_t key, int64_t count, const float* keys, const float* values) {
    const MaskTile tile = TileOf(group, key);
    if (tile == MaskTile::kHidden) return;
    const int64_t width = attention_.key_width, value_width = attention_.value_width;
    MultiplyAllLanes<Isa, Vectors>(keys, count, width, 1, width, queries_ + group * kLanes * width, scores_, false);
    if (tile == MaskTile::kMixed) AddMask(group, key, count);
    float* sums = sums_ + group * kLanes * value_width;
    for (int i = 0; i < Vectors; ++i) AddExponentials(group * kLanes + i * Isa::kFloats, i * Isa::kFloats, count, sums);
    MultiplyAllLanes<Isa, Vectors>(values, value_width, 1, value_width, count, scores_, sums, true);
  }

  void AddMask(int64_t group, int64_t key, int64_t count) {
    for (int64_t lane = 0; lane < RowsOf(group); lane += Isa::kFloats) {
      const int64_t last = std::min(lane + Isa::kFloats, RowsOf(group)) - 1;
      const float* mask = Mask(group * kLanes + lane, key);
      float* scores = scores_ + lane;
      // Query heads of one token mostly share a row of the mask. Lanes that are only there to fill a vector may get any.
      if (attention_.mask_head_rows == 0 && mask == Mask(group * kLanes + last, key)) {
        for (int64_t i = 0; i < count; ++i)
          Isa::Store(scores + i * kLanes, Isa::Plus(Isa::Load(scores + i * kLanes), Isa::Fill(mask[i])));
        continue;
      }
      for (int64_t j = lane; j <= last; ++j, ++scores) {
        mask = Mask(group * kLanes + j, key);
        for (int64_t i = 0; i < count; ++i) scores[i * kLanes] += mask[i];
      }
    }
  }

  // The row of the mask for a row of the task, from this key on.
  const float* Mask(int64_t row, int64_t key) const {
    const int64_t mask_row = TaskRow(attention_, task_, row).mask_row(attention_, task_.batch);
    return attention_.mask + mask_row * attention_.keys() + key;
  }

  // Makes exponentials of the scores of a vector of rows, less the largest one; all sums so far are then those of that.
  void AddExponentials(int64_t row, int64_t lane, int64_t count, float* sums) {
    const Floats before = Isa::Load(largest_ + row);
    Floats largest = before;
    for (int64_t i = 0; i < count; ++i) largest = Isa::Larger(Isa::Load(scores_ + i * kLanes + lane), largest);
    Isa::Store(largest_ + row, largest);
    const Floats shrunk = Exp<Isa>(Isa::Minus(before, largest));
    Floats total = Isa::Times(Isa::Load(totals_ + row), shrunk);
    for (int64_t i = 0; i < count; ++i) {
      float* score = scores_ + i * kLanes + lane;
      const Floats exponential = Exp<Isa>(Isa::Minus(Isa::Load(score), largest));
      Isa::Store(score, exponential);
      total = Isa::Plus(total, exponential);
    }
    Isa::Store(totals_ + row, total);
    for (int64_t column = 0; column < attention_.value_width; ++column) {
      float* sum = sums + column * kLanes + lane;
      Isa::Store(sum, Isa::Times(Isa::Load(sum), shrunk));
    }
  }

  void Finish(int64_t row) {
    const int64_t width = attention_.value_width;
    const float* sums = sums_ + row / kLanes * kLanes * width + row % kLanes;
    if (task_.partial == nullptr) {
      float* y = TaskRow(attention_, task_, row).output(attention_, task_.batch);
      for (int64_t column = 0; column < width; ++column) y[column] = sums[column * kLanes] / totals_[row];
      return;
    }
    float* out = task_.partial + row * (width + 2);
    *out++ = largest_[row];
    *out++ = totals_[row];
    for (int64_t column = 0; column < width; ++column) out[column] = sums[column * kLanes];
  }

  const Attention& attention_;
  const AttentionTask& task_;
  int64_t groups_;
  float* queries_; // by groups of lanes: (D, lanes)
  float* sums_;    // by groups of lanes: (E, lanes)
  float* largest_;
  float* totals_;
  float* scores_; // (kTileKeys, lanes)
};

// Adds the dot products of one query with keys beside each other to `scores`.
template <class Isa>
BLOCKPRESS_NOINLINE void AddDots(const float* query, const float* keys, int64_t count, int64_t width, float* scores) {
  using Floats = typename Isa::Floats;
  const int64_t whole = width / Isa::kFloats * Isa::kFloats;
  int64_t key = 0;
  for (; key + 4 <= count; key += 4) {
    const float* k = keys + key * width;
    Floats a = Isa::Zero(), b = a, c = a, d = a;
    for (int64_t i = 0; i < whole; i += Isa::kFloats) {
      const Floats q = Isa::Load(query + i);
      a = Isa::Fma(q, Isa::Load(k + i), a);
      b = Isa::Fma(q, Isa::Load(k + width + i), b);
      c = Isa::Fma(q, Isa::Load(k + 2 * width + i), c);
      d = Isa::Fma(q, Isa::Load(k + 3 * width + i), d);
    }
    Isa::AddSums(a, b, c, d, scores + key);
  }
  for (; key < count; ++key) {
    Floats sum = Isa::Zero();
    for (int64_t i = 0; i < whole; i += Isa::kFloats)
      sum = Isa::Fma(Isa::Load(query + i), Isa::Load(keys + key * width + i), sum);
    scores[key] += Isa::Sum(sum);
  }
  if (whole == width) return;
  for (key = 0; key < count; ++key)
    for (int64_t i = whole; i < width; ++i) scores[key] += query[i] * keys[key * width + i];
}

// Adds the weighted sum of `Vectors` vectors of each of the values to `sums`.
template <class Isa, int Vectors>
BLOCKPRESS_NOINLINE void AddWeighted(const float* weights, const float* values, int64_t count, int64_t width,
                                     float* sums) {
  using Floats = typename Isa::Floats;
  Floats total[Vectors];
  for (int i = 0; i < Vectors; ++i) total[i] = Isa::Load(sums + i * Isa::kFloats);
  for (int64_t key = 0; key < count; ++key, values += width) {
    const Floats weight = Isa::Fill(weights[key]);
    for (int i = 0; i < Vectors; ++i) total[i] = Isa::Fma(weight, Isa::Load(values + i * Isa::kFloats), total[i]);
  }
  for (int i = 0; i < Vectors; ++i) Isa::Store(sums + i * Isa::kFloats, total[i]);
}

// A task of very few rows, one after the other over each tile.
template <class Isa> class KeyTask {
  using Floats = typename Isa::Floats;
  static constexpr int kSums = 8; // vectors of a head's columns at a time

public:
  KeyTask(const Attention& attention, const AttentionTask& task) : attention_(attention), task_(task) {
    queries_ = task.memory;
    sums_ = queries_ + task.rows * attention.key_width;
    largest_ = sums_ + task.rows * attention.value_width;
    totals_ = largest_ + task.rows;
    scores_ = totals_ + task.rows;
  }

  void Run() {
    Begin();
    TaskTiles<Isa>(attention_, task_).Each([&](int64_t key, int64_t count, const float* keys, const float* values) {
      for (int64_t row = 0; row < task_.rows; ++row) AddTile(row, key, count, keys, values);
    });
    for (int64_t row = 0; row < task_.rows; ++row) Finish(row);
  }

private:
  void Begin() {
    std::fill_n(sums_, task_.rows * attention_.value_width, 0.0f);
    std::fill_n(largest_, task_.rows, kLowest);
    std::fill_n(totals_, task_.rows, 0.0f);
    for (int64_t row = 0; row < task_.rows; ++row) {
      const TaskRow at(attention_, task_, row);
      Rotate(attention_, task_.batch, at.token, at.query(attention_, task_.batch), attention_.scale,
             queries_ + row * attention_.key_width, 1);
    }
  }

  void AddTile(int64_t row, int64_t key, int64_t count, const float* keys, const float* values) {
    const int64_t mask_row = TaskRow(attention_, task_, row).mask_row(attention_, task_.batch);
    const MaskTile tile = attention_.tiles[mask_row * attention_.tiles_per_row() + key / kTileKeys];
    if (tile == MaskTile::kHidden) return;
    const int64_t width = attention_.key_width;
    std::fill_n(scores_, count, 0.0f);
    AddDots<Isa>(queries_ + row * width, keys, count, width, scores_);
    if (tile == MaskTile::kMixed) {
      const float* mask = attention_.mask + mask_row * attention_.keys() + key;
      for (int64_t i = 0; i < count; ++i) scores_[i] += mask[i];
    }
    AddExponentials(row, count);
    AddValues(row, values, count);
  }

  void AddExponentials(int64_t row, int64_t count) {
    const int64_t padded = (count + Isa::kFloats - 1) / Isa::kFloats * Isa::kFloats;
    std::fill(scores_ + count, scores_ + padded, -std::numeric_limits<float>::infinity());
    Floats largest = Isa::Fill(largest_[row]);
    for (int64_t i = 0; i < padded; i += Isa::kFloats) largest = Isa::Larger(Isa::Load(scores_ + i), largest);
    float lanes[Isa::kFloats];
    Isa::Store(lanes, largest);
    const float most = *std::max_element(lanes, lanes + Isa::kFloats);
    Isa::Store(lanes, Exp<Isa>(Isa::Fill(largest_[row] - most)));
    const float shrunk = lanes[0];
    Floats total = Isa::Zero();
    for (int64_t i = 0; i < padded; i += Isa::kFloats) {
      const Floats exponential = Exp<Isa>(Isa::Minus(Isa::Load(scores_ + i), Isa::Fill(most)));
      Isa::Store(scores_ + i, exponential);
      total = Isa::Plus(total, exponential);
    }
    largest_[row] = most;
    totals_[row] = totals_[row] * shrunk + Isa::Sum(total);
    float* sums = sums_ + row * attention_.value_width;
    for (int64_t column = 0; column < attention_.value_width; ++column) sums[column] *= shrunk;
  }

  void AddValues(int64_t row, const float* values, int64_t count) {
    const int64_t width = attention_.value_width;
    float* sums = sums_ + row * width;
    int64_t column = 0;
    for (; column + kSums * Isa::kFloats <= width; column += kSums * Isa::kFloats)
      AddWeighted<Isa, kSums>(scores_, values + column, count, width, sums + column);
    for (; column + Isa::kFloats <= width; column += Isa::kFloats)
      AddWeighted<Isa, 1>(scores_, values + column, count, width, sums + column);
    for (; column < width; ++column)
      for (int64_t i = 0; i < count; ++i) sums[column] += scores_[i] * values[i * width + column];
  }

  void Finish(int64_t row) {
    const int64_t width = attention_.value_width;
    const float* sums = sums_ + row * width;
    if (task_.partial == nullptr) {
      float* y = TaskRow(attention_, task_, row).output(attention_, task_.batch);
      for (int64_t column = 0; column < width; ++column) y[column] = sums[column] / totals_[row];
      return;
    }
    float* out = task_.partial + row * (width + 2);
    *out++ = largest_[row];
    *out++ = totals_[row];
    std::copy_n(sums, width, out);
  }

  const Attention& attention_;
  const AttentionTask& task_;
  float* queries_; // (rows, D)
  float* sums_;    // (rows, E)
  float* largest_;
  float* totals_;
  float* scores_; // of one row
};

// What Kernels::attend is, for one instruction set.
template <class Isa> void Attend(const Attention& attention, const AttentionTask& task) {
  if (task.rows <= 2) return KeyTask<Isa>(attention, task).Run();
  if (task.rows <= Isa::kFloats) return LaneTask<Isa, 1>(attention, task).Run();
  LaneTask<Isa, 2>(attention, task).Run();
}

} // namespace blockpress
