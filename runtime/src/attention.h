// Attention of new tokens over a cache of keys and values, which it also extends.
//
// Queries that share a key head are rows that meet the same keys: row r of a head stands for token r / G and the query
// head r % G of its G. The softmax goes over tiles of keys and keeps, for each row, the largest score so far, the sum of
// the exponentials and the sum of the values (FlashAttention, arXiv 2205.14135), so that no score is kept.
#pragma once

#include <cstdint>

#include "message.h"
#include "ort_abi.h"

namespace blockpress {

struct Kernels;
class Host;

constexpr int64_t kTileKeys = 64;   // keys that are one step of the softmax
constexpr int64_t kMostQueries = 64; // rows of one task
constexpr int64_t kRowPadding = 32;  // rows of a task's memory are whole multiples of this: two of the widest vectors

// What a tile of the mask says for one of its rows.
enum class MaskTile : uint8_t {
  kMixed,
  kZero,   // all keys of the tile are seen as they are
  kHidden, // none has a part in the softmax
};

// Checked, and not owned. B batches, S new tokens, P past ones, T = P + S keys, H query heads, N key heads. The past has
// room for C keys: for P, or for T or more, and then the present is the same memory.
struct Attention {
  int64_t batches, tokens, past, heads, key_heads;
  int64_t key_width, value_width; // D and E, of one head
  int64_t past_room;              // C
  int64_t rotary_width;           // the first columns of queries and keys that are rotated; 0 for none
  float scale;
  const float* q;          // (B, S, H, D)
  const float* k;          // (B, S, N, D)
  const float* v;          // (B, S, N, E)
  const float* past_key;   // (B, N, C, D)
  const float* past_value; // (B, N, C, E)
  const float* mask;       // rows of T, from one batch, head and token to the next so many rows further
  int64_t mask_batch_rows, mask_head_rows, mask_token_rows;
  int64_t mask_rows;
  const float* cos; // rows of rotary_width, one a token, from one batch to the next so many rows further
  const float* sin; // its first half negated
  int64_t table_batch_rows;
  const MaskTile* tiles; // (mask_rows, tiles_per_row)
  float* y;              // (B, S, H, E)
  float* present_key;    // (B, N, C or T, D)
  float* present_value;  // (B, N, C or T, E)

  int64_t keys() const { return past + tokens; }
  bool has_room() const { return past_room > past; } // for the new keys, in the past's memory
  int64_t present_room() const { return has_room() ? past_room : keys(); }
  int64_t tiles_per_row() const { return (keys() + kTileKeys - 1) / kTileKeys; }
  int64_t group() const { return heads / key_heads; }
  int64_t rows() const { return tokens * group(); } // that meet one key head
  int64_t mask_row(int64_t batch, int64_t head, int64_t token) const {
    return batch * mask_batch_rows + head * mask_head_rows + token * mask_token_rows;
  }
};

// Some rows of one key head and some of its keys.
struct AttentionTask {
  int64_t batch, key_head;
  int64_t first_row, rows;     // at most kMostQueries
  int64_t first_key, last_key; // the first one a multiple of kTileKeys
  bool extends;                // whether these keys and values first have to be put into the present ones
  float* partial; // (rows, value_width + 2): largest score, sum of exponentials, sum of values; null: all keys are here
  float* memory;  // TaskMemory() floats
};

// Where a task's row lies.
struct TaskRow {
  int64_t token, head; // of all query heads
  TaskRow(const Attention& attention, const AttentionTask& task, int64_t row)
      : token((task.first_row + row) / attention.group()),
        head(task.key_head * attention.group() + (task.first_row + row) % attention.group()) {}

  const float* query(const Attention& attention, int64_t batch) const {
    return attention.q + place(attention, batch) * attention.key_width;
  }
  float* output(const Attention& attention, int64_t batch) const {
    return attention.y + place(attention, batch) * attention.value_width;
  }
  int64_t mask_row(const Attention& attention, int64_t batch) const { return attention.mask_row(batch, head, token); }

 private:
  int64_t place(const Attention& attention, int64_t batch) const {
    return (batch * attention.tokens + token) * attention.heads + head;
  }
};

// The past and the present keys and values of one key head.
struct HeadCache {
  const float *past_keys, *past_values;
  float *keys, *values;
  HeadCache(const Attention& attention, int64_t batch, int64_t key_head) {
    const int64_t head = batch * attention.key_heads + key_head;
    const int64_t past = head * attention.past_room, present = head * attention.present_room();
    past_keys = attention.past_key + past * attention.key_width;
    past_values = attention.past_value + past * attention.value_width;
    keys = attention.present_key + present * attention.key_width;
    values = attention.present_value + present * attention.value_width;
  }
};

// The floats that a task of so many rows works in: queries, sums, scores, and two numbers of each row.
inline int64_t TaskMemory(const Attention& attention, int64_t rows) {
  const int64_t padded = (rows + kRowPadding - 1) / kRowPadding * kRowPadding;
  return padded * (attention.key_width + attention.value_width + kTileKeys + 2);
}

// x or, in its first columns, x turned by the angles of the token, times `scale`, to `out`, whose columns lie `step` apart.
void Rotate(const Attention& attention, int64_t batch, int64_t token, const float* x, float scale, float* out,
            int64_t step);

// Puts these keys of a head, past and new ones, and their values into the present ones, but what is there already.
void ExtendCache(const Attention& attention, int64_t batch, int64_t head, int64_t first_key, int64_t last_key);

// Calculates y and the present keys and values; null where all is well. Each output is one task's, and tasks do not
// depend on the number of threads, so that threads do not change a bit.
ort::Status* Attend(const Kernels& kernels, Attention attention, Host* host);

struct Tensor;

enum AttentionInput : int { kQuery, kKey, kValue, kPastKey, kPastValue, kAttentionMask, kCos, kSin, kAttentionInputs };

// Whether these inputs fit together; then `attention` is all but its outputs and the mask's tiles. Without the last two
// inputs, nothing is rotated. `attention` comes with heads, key_heads and scale.
bool CheckAttention(const Tensor* inputs, bool rotates, Attention* attention, Message* message);

} // namespace blockpress
