#include "attention.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>

#include "buffer.h"
#include "kernels.h"
#include "products.h"

namespace blockpress {
namespace {

constexpr int64_t kFewRows = 16; // of one key head: then each task extends the cache and uses what it copied
constexpr int64_t kLongCache = 1024;
constexpr int64_t kExtendedKeys = 256; // of one task that does nothing else
// A call with fewer floats of keys and values, times rows, is not worth waking another thread.
constexpr int64_t kSharedFloats = 1 << 16;
// Scores are far smaller than this: a key with such a mask has no part in the softmax of a row that sees another one.
constexpr float kHiddenMask = -1e30f;
constexpr float kSeenMask = -1e20f;

// How many keys a task takes where there are few rows: whole tiles, by the number of keys alone.
int64_t ChunkKeys(int64_t keys) { return keys > kLongCache ? 4 * kTileKeys : 2 * kTileKeys; }

struct Run {
  const Kernels* kernels;
  const Attention* attention;
  int64_t heads; // batches times key heads
  int64_t chunks, chunk_keys;
  int64_t blocks; // of rows
  MaskTile* tiles;
  float* partials;
  std::atomic<bool> out_of_memory{false};
};

ort::Status* ForEach(Run* run, Host* host, bool shared, void (*task)(void*, size_t), int64_t count) {
  if (shared && count > 1) return host->ForEach(task, static_cast<size_t>(count), run);
  for (int64_t i = 0; i < count; ++i) task(run, static_cast<size_t>(i));
  return nullptr;
}

// Those of the keys from first_key to last_key - 1 that are old.
void CopyPast(const Attention& attention, const float* past, int64_t first_key, int64_t last_key, int64_t width,
              float* present) {
  const int64_t last = std::min(last_key, attention.past);
  if (first_key >= last || past == present) return;
  std::memcpy(present + first_key * width, past + first_key * width,
              static_cast<size_t>((last - first_key) * width) * sizeof(float));
}

// Looks through one row of the mask.
void MaskTask(void* argument, size_t index) {
  const Run& run = *static_cast<Run*>(argument);
  const int64_t keys = run.attention->keys(), count = run.attention->tiles_per_row();
  const float* mask = run.attention->mask + static_cast<int64_t>(index) * keys;
  MaskTile* tiles = run.tiles + static_cast<int64_t>(index) * count;
  bool sees = false;
  for (int64_t tile = 0; tile < count; ++tile) {
    const int64_t last = std::min((tile + 1) * kTileKeys, keys);
    bool zero = true, hidden = true, seen = false;
    for (int64_t key = tile * kTileKeys; key < last; ++key) {
      zero &= mask[key] == 0;
      hidden &= mask[key] <= kHiddenMask;
      seen |= mask[key] >= kSeenMask;
    }
    tiles[tile] = zero ? MaskTile::kZero : hidden ? MaskTile::kHidden : MaskTile::kMixed;
    sees |= seen;
  }
  if (sees) return;
  for (int64_t tile = 0; tile < count; ++tile) { // a row that is hidden everywhere sees all keys alike
    if (tiles[tile] == MaskTile::kHidden) tiles[tile] = MaskTile::kMixed;
  }
}

void ExtendTask(void* argument, size_t index) {
  const Run& run = *static_cast<Run*>(argument);
  const Attention& attention = *run.attention;
  const auto task = static_cast<int64_t>(index);
  const int64_t head = task % run.heads, first = task / run.heads * kExtendedKeys;
  const int64_t last = std::min(first + kExtendedKeys, attention.keys());
  const int64_t batch = head / attention.key_heads, key_head = head % attention.key_heads;
  ExtendCache(attention, batch, key_head, first, last);
}

void AttendTask(void* argument, size_t index) {
  Run& run = *static_cast<Run*>(argument);
  const Attention& attention = *run.attention;
  const auto number = static_cast<int64_t>(index);
  const int64_t head = number % run.heads, chunk = number / run.heads % run.chunks;
  const int64_t block = number / run.heads / run.chunks;
  AttentionTask task{};
  task.batch = head / attention.key_heads;
  task.key_head = head % attention.key_heads;
  task.first_row = block * kMostQueries;
  task.rows = std::min(kMostQueries, attention.rows() - task.first_row);
  task.first_key = chunk * run.chunk_keys;
  task.last_key = std::min(task.first_key + run.chunk_keys, attention.keys());
  task.extends = run.blocks == 1 && attention.rows() <= kFewRows;
  Buffer memory;
  task.memory = memory.Allocate<float>(TaskMemory(attention, task.rows));
  if (task.memory == nullptr) {
    run.out_of_memory = true;
    return;
  }
  if (run.chunks > 1) {
    task.partial = run.partials + (chunk * run.heads + head) * attention.rows() * (attention.value_width + 2);
  }
  run.kernels->attend(attention, task);
}

// Puts the parts of the softmax together that tasks have of one row.
void CombineTask(void* argument, size_t index) {
  const Run& run = *static_cast<Run*>(argument);
  const Attention& attention = *run.attention;
  const int64_t width = attention.value_width, rows = attention.rows(), group = attention.group();
  const int64_t head = static_cast<int64_t>(index) / rows, row = static_cast<int64_t>(index) % rows;
  const int64_t batch = head / attention.key_heads, first_query = head % attention.key_heads * group;
  const auto part = [&](int64_t chunk) {
    return run.partials + ((chunk * run.heads + head) * rows + row) * (width + 2);
  };
  float largest = part(0)[0];
  for (int64_t chunk = 1; chunk < run.chunks; ++chunk) largest = std::fmax(largest, part(chunk)[0]);
  float* y = attention.y + ((batch * attention.tokens + row / group) * attention.heads + first_query + row % group) * width;
  std::fill_n(y, width, 0.0f);
  float sum = 0;
  for (int64_t chunk = 0; chunk < run.chunks; ++chunk) {
    const float* values = part(chunk);
    const float weight = std::exp(values[0] - largest);
    sum += weight * values[1];
    for (int64_t column = 0; column < width; ++column) y[column] += weight * values[2 + column];
  }
  for (int64_t column = 0; column < width; ++column) y[column] /= sum;
}

} // namespace

void Rotate(const Attention& attention, int64_t batch, int64_t token, const float* x, float scale, float* out,
            int64_t step) {
  const int64_t width = attention.rotary_width, half = width / 2;
  const int64_t angles = (batch * attention.table_batch_rows + token) * width;
  const float* cos = attention.cos + angles;
  const float* sin = attention.sin + angles;
  for (int64_t i = 0; i < half; ++i) {
    out[i * step] = (x[i] * cos[i] + x[half + i] * sin[i]) * scale;
    out[(half + i) * step] = (x[half + i] * cos[half + i] + x[i] * sin[half + i]) * scale;
  }
  for (int64_t i = width; i < attention.key_width; ++i) out[i * step] = x[i] * scale;
}

void ExtendCache(const Attention& attention, int64_t batch, int64_t head, int64_t first_key, int64_t last_key) {
  const int64_t width = attention.key_width, value_width = attention.value_width;
  const HeadCache of(attention, batch, head);
  CopyPast(attention, of.past_keys, first_key, last_key, width, of.keys);
  CopyPast(attention, of.past_values, first_key, last_key, value_width, of.values);
  for (int64_t key = std::max(first_key, attention.past); key < last_key; ++key) {
    const int64_t token = key - attention.past;
    const int64_t place = (batch * attention.tokens + token) * attention.key_heads + head;
    Rotate(attention, batch, token, attention.k + place * width, 1.0f, of.keys + key * width, 1);
    std::memcpy(of.values + key * value_width, attention.v + place * value_width,
                static_cast<size_t>(value_width) * sizeof(float));
  }
}

ort::Status* Attend(const Kernels& kernels, Attention attention, Host* host) {
  Run run;
  run.kernels = &kernels;
  run.attention = &attention;
  run.heads = attention.batches * attention.key_heads;
  const int64_t rows = attention.rows(), keys = attention.keys();
  if (run.heads == 0) return nullptr;
  const int64_t floats = run.heads * keys * (attention.key_width + attention.value_width);
  const bool few = rows <= kFewRows, shared = rows != 0 && floats > kSharedFloats / rows;
  if (!few || rows == 0) { // else what attends to keys also puts them into the cache
    const int64_t segments = (keys + kExtendedKeys - 1) / kExtendedKeys;
    if (auto* status = ForEach(&run, host, shared, &ExtendTask, segments * run.heads)) return status;
  }
  if (rows == 0) return nullptr;

  Buffer tiles, partials;
  run.tiles = tiles.AllocateRows<MaskTile>(attention.mask_rows, attention.tiles_per_row());
  if (run.tiles == nullptr) return host->Fail(ort::kFail, "out of memory for the tiles of the mask");
  attention.tiles = run.tiles;

  run.blocks = few ? 1 : (rows + kMostQueries - 1) / kMostQueries;
  run.chunk_keys = few ? ChunkKeys(keys) : attention.tiles_per_row() * kTileKeys;
  run.chunks = (keys + run.chunk_keys - 1) / run.chunk_keys;
  if (run.chunks > 1) {
    run.partials = partials.AllocateRows<float>(run.chunks * run.heads * rows, attention.value_width + 2);
    if (run.partials == nullptr) return host->Fail(ort::kFail, "out of memory for parts of the softmax");
  }
  if (auto* status = ForEach(&run, host, attention.mask_rows * keys > kSharedFloats, &MaskTask, attention.mask_rows)) {
    return status;
  }
  if (auto* status = ForEach(&run, host, shared, &AttendTask, run.heads * run.chunks * run.blocks)) return status;
  if (run.out_of_memory) return host->Fail(ort::kFail, "out of memory for the scores");
  return run.chunks == 1 ? nullptr : ForEach(&run, host, false, &CombineTask, run.heads * rows);
}

} // namespace blockpress
