// What the inputs of attention must be, so that no kernel is led outside of them.

#include <cinttypes>

#include "attention.h"
#include "checks.h"

namespace blockpress {
namespace {

constexpr const char* kNames[kAttentionInputs] = {"q",          "k",    "v",   "past_key",
                                                  "past_value", "mask", "cos", "sin"};

bool CheckTensor(int which, const Tensor& tensor, Message* message) {
  if (tensor.type != ort::kFloat) {
    return message->Set("%s must be float32, but has element type %d of ONNX", kNames[which],
                        static_cast<int>(tensor.type));
  }
  if (reinterpret_cast<uintptr_t>(tensor.data) % sizeof(float) != 0) {
    return message->Set("%s lies at an address that is no multiple of 4 bytes", kNames[which]);
  }
  const bool flat = which <= kValue && tensor.rank == 3;
  if (tensor.rank == 4 || flat) return true;
  return message->Set("%s must have %s axes, but has %" PRId64, kNames[which], which <= kValue ? "3 or 4" : "4",
                      tensor.rank);
}

bool CheckAxis(int which, const Tensor& tensor, int axis, int64_t size, bool may_be_one, Message* message) {
  if (tensor.dims[axis] == size || (may_be_one && tensor.dims[axis] == 1)) return true;
  return message->Set("axis %d of %s must be %" PRId64 "%s, but is %" PRId64, axis, kNames[which], size,
                      may_be_one ? " or 1" : "", tensor.dims[axis]);
}

// The width of a head in (B, S, heads, width) or (B, S, heads * width).
bool TakeWidth(int which, const Tensor& tensor, int64_t heads, int64_t* width, Message* message) {
  if (tensor.rank == 4) {
    *width = tensor.dims[3];
    return CheckAxis(which, tensor, 2, heads, false, message);
  }
  *width = tensor.dims[2] / heads;
  if (tensor.dims[2] % heads == 0) return true;
  return message->Set("the last axis of %s must be a multiple of %" PRId64 " heads, but is %" PRId64, kNames[which],
                      heads, tensor.dims[2]);
}

bool CheckTokens(const Tensor* inputs, Attention* attention, Message* message) {
  attention->batches = inputs[kQuery].dims[0];
  attention->tokens = inputs[kQuery].dims[1];
  int64_t width_of_k = 0;
  if (!TakeWidth(kQuery, inputs[kQuery], attention->heads, &attention->key_width, message) ||
      !TakeWidth(kKey, inputs[kKey], attention->key_heads, &width_of_k, message) ||
      !TakeWidth(kValue, inputs[kValue], attention->key_heads, &attention->value_width, message)) {
    return false;
  }
  for (int which : {kKey, kValue}) {
    if (!CheckAxis(which, inputs[which], 0, attention->batches, false, message) ||
        !CheckAxis(which, inputs[which], 1, attention->tokens, false, message)) {
      return false;
    }
  }
  if (width_of_k == attention->key_width) return true;
  return message->Set("the heads of k must be as wide as those of q, %" PRId64 ", but are %" PRId64,
                      attention->key_width, width_of_k);
}

// The mask tells how many tokens are past. A past without room may have any heads and width.
bool CheckPast(const Tensor* inputs, Attention* attention, Message* message) {
  const int64_t keys = inputs[kAttentionMask].dims[3], room = inputs[kPastKey].dims[2];
  attention->past = keys - attention->tokens;
  attention->past_room = room;
  if (attention->past < 0 || (room != attention->past && room < keys)) {
    return message->Set("axis 3 of mask is %" PRId64 ", so axis 2 of past_key must be %" PRId64 ", without the %" PRId64
                        " new tokens, or have room for all, but is %" PRId64,
                        keys, attention->past, attention->tokens, room);
  }
  const int64_t widths[] = {attention->key_width, attention->value_width};
  for (int i = 0; i < 2; ++i) {
    const int which = kPastKey + i;
    if (!CheckAxis(which, inputs[which], 2, room, false, message)) return false;
    if (room == 0) continue;
    if (!CheckAxis(which, inputs[which], 0, attention->batches, false, message) ||
        !CheckAxis(which, inputs[which], 1, attention->key_heads, false, message) ||
        !CheckAxis(which, inputs[which], 3, widths[i], false, message)) {
      return false;
    }
  }
  return true;
}

bool CheckMask(const Tensor& mask, Attention* attention, Message* message) {
  const int64_t sizes[] = {attention->batches, attention->heads, attention->tokens};
  int64_t* const steps[] = {&attention->mask_batch_rows, &attention->mask_head_rows, &attention->mask_token_rows};
  attention->mask_rows = 1;
  for (int axis = 2; axis >= 0; --axis) {
    if (!CheckAxis(kAttentionMask, mask, axis, sizes[axis], true, message)) return false;
    *steps[axis] = mask.dims[axis] == 1 ? 0 : attention->mask_rows;
    attention->mask_rows *= mask.dims[axis];
  }
  return true;
}

bool CheckTables(const Tensor* inputs, Attention* attention, Message* message) {
  const int64_t width = inputs[kCos].dims[3];
  if (width % 2 != 0 || width > attention->key_width) {
    return message->Set("the last axis of cos must be even and at most %" PRId64 ", but is %" PRId64,
                        attention->key_width, width);
  }
  for (int which : {kCos, kSin}) {
    const Tensor& table = inputs[which];
    if (!CheckAxis(which, table, 0, attention->batches, true, message) ||
        !CheckAxis(which, table, 1, 1, false, message) ||
        !CheckAxis(which, table, 2, attention->tokens, false, message) ||
        !CheckAxis(which, table, 3, width, false, message)) {
      return false;
    }
  }
  if (!CheckAxis(kSin, inputs[kSin], 0, inputs[kCos].dims[0], false, message)) return false;
  attention->rotary_width = width;
  attention->table_batch_rows = inputs[kCos].dims[0] == 1 ? 0 : attention->tokens;
  return true;
}

} // namespace

bool CheckAttention(const Tensor* inputs, bool rotates, Attention* attention, Message* message) {
  if (attention->heads < 1 || attention->key_heads < 1 || attention->heads % attention->key_heads != 0) {
    return message->Set("num_heads must be a multiple of kv_heads, both at least 1, but they are %" PRId64
                        " and %" PRId64,
                        attention->heads, attention->key_heads);
  }
  const int count = rotates ? kAttentionInputs : kCos;
  for (int which = 0; which < count; ++which) {
    if (!CheckTensor(which, inputs[which], message)) return false;
  }
  if (!CheckTokens(inputs, attention, message) || !CheckPast(inputs, attention, message) ||
      !CheckMask(inputs[kAttentionMask], attention, message)) {
    return false;
  }
  if (rotates && !CheckTables(inputs, attention, message)) return false;
  const auto floats = [&](AttentionInput which) { return static_cast<const float*>(inputs[which].data); };
  attention->q = floats(kQuery);
  attention->k = floats(kKey);
  attention->v = floats(kValue);
  attention->past_key = floats(kPastKey);
  attention->past_value = floats(kPastValue);
  attention->mask = floats(kAttentionMask);
  if (rotates) attention->cos = floats(kCos), attention->sin = floats(kSin);
  return true;
}

} // namespace blockpress
