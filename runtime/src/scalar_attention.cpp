// Attention in plain C++, which the tests hold the vector kernels against: sums in double.

#include <algorithm>
#include <cmath>
#include <limits>

#include "attention.h"
#include "kernels.h"

namespace blockpress {
namespace {

// One row over all keys of the task.
void AttendRow(const Attention& attention, const AttentionTask& task, int64_t row) {
  const TaskRow at(attention, task, row);
  const HeadCache of(attention, task.batch, task.key_head);
  const int64_t width = attention.key_width, value_width = attention.value_width;
  const float* mask = attention.mask + at.mask_row(attention, task.batch) * attention.keys();
  float* query = task.memory;
  Rotate(attention, task.batch, at.token, at.query(attention, task.batch), attention.scale, query, 1);

  const auto score = [&](int64_t key) {
    const float* k = of.keys + key * width;
    double sum = 0;
    for (int64_t i = 0; i < width; ++i) sum += static_cast<double>(query[i]) * static_cast<double>(k[i]);
    return static_cast<float>(sum) + mask[key];
  };
  float largest = std::numeric_limits<float>::lowest();
  for (int64_t key = task.first_key; key < task.last_key; ++key) largest = std::fmax(largest, score(key));
  double total = 0;
  float* out = task.partial == nullptr ? at.output(attention, task.batch) : task.partial + row * (value_width + 2) + 2;
  std::fill_n(out, value_width, 0.0f);
  for (int64_t tile = task.first_key; tile < task.last_key; tile += kTileKeys) {
    const int64_t count = std::min(kTileKeys, task.last_key - tile);
    double weights[kTileKeys];
    for (int64_t i = 0; i < count; ++i) {
      weights[i] = std::exp(static_cast<double>(score(tile + i)) - static_cast<double>(largest));
      total += weights[i];
    }
    const float* values = of.values + tile * value_width;
    for (int64_t column = 0; column < value_width; ++column) {
      double sum = static_cast<double>(out[column]);
      for (int64_t i = 0; i < count; ++i) sum += weights[i] * static_cast<double>(values[i * value_width + column]);
      out[column] = static_cast<float>(sum);
    }
  }
  if (task.partial != nullptr) {
    out[-2] = largest;
    out[-1] = static_cast<float>(total);
    return;
  }
  for (int64_t column = 0; column < value_width; ++column) {
    out[column] = static_cast<float>(static_cast<double>(out[column]) / total);
  }
}

} // namespace

void AttendScalar(const Attention& attention, const AttentionTask& task) {
  if (task.extends) ExtendCache(attention, task.batch, task.key_head, task.first_key, task.last_key);
  for (int64_t row = 0; row < task.rows; ++row) AttendRow(attention, task, row);
}

} // namespace blockpress
