// CachedAttention and RotaryAttention: the attention of new tokens, which first join the cache of keys and values.

#include <cinttypes>
#include <iterator>

#include "attention.h"
#include "ort_operator.h"

namespace blockpress {
namespace {

struct AttentionNode : Node {
  bool rotates;
  int64_t heads, key_heads;
  float scale;
};

ort::Status* ReadAttributes(const ort::KernelInfo* info, AttentionNode* node) {
  if (auto* status = node->api->KernelInfoGetInt64(info, "num_heads", &node->heads)) return status;
  if (auto* status = node->api->KernelInfoGetInt64(info, "kv_heads", &node->key_heads)) return status;
  return node->api->KernelInfoGetFloat(info, "scale", &node->scale);
}

ort::Status* BLOCKPRESS_ORT_CALL Create(const ort::CustomOp* op, const ort::Api* api, const ort::KernelInfo* info,
                                        void** result) {
  const auto* of = static_cast<const AttentionOperator*>(op);
  AttentionNode* node = nullptr;
  if (auto* status = MakeNode(of->name, api, &node)) return status;
  node->rotates = of->rotates;
  auto* status = ReadAttributes(info, node);
  if (status != nullptr) delete node;
  else *result = node;
  return status;
}

void BLOCKPRESS_ORT_CALL Destroy(void* self) { delete static_cast<AttentionNode*>(self); }

ort::Status* MakeOutputs(const AttentionNode& node, ort::KernelContext* context, Attention* attention) {
  const int64_t y[] = {attention->batches, attention->tokens, attention->heads * attention->value_width};
  const int64_t key[] = {attention->batches, attention->key_heads, attention->present_room(), attention->key_width};
  const int64_t value[] = {attention->batches, attention->key_heads, attention->present_room(),
                           attention->value_width};
  if (auto* status = MakeOutput(node, context, 0, y, std::size(y), &attention->y)) return status;
  if (auto* status = MakeOutput(node, context, 1, key, std::size(key), &attention->present_key)) return status;
  return MakeOutput(node, context, 2, value, std::size(value), &attention->present_value);
}

ort::Status* BLOCKPRESS_ORT_CALL Compute(void* self, ort::KernelContext* context) {
  const auto& node = *static_cast<const AttentionNode*>(self);
  Tensor inputs[kAttentionInputs];
  const size_t count = node.rotates ? kAttentionInputs : kCos;
  for (size_t i = 0; i < count; ++i) {
    if (auto* status = TakeTensor(node, context, i, &inputs[i])) return status;
  }
  Attention attention{};
  attention.heads = node.heads;
  attention.key_heads = node.key_heads;
  attention.scale = node.scale;
  Message message;
  if (!CheckAttention(inputs, node.rotates, &attention, &message)) {
    return Fail(node, ort::kInvalidArgument, message.text());
  }
  if (auto* status = MakeOutputs(node, context, &attention)) return status;
  const bool in_place = attention.present_key == attention.past_key && attention.present_value == attention.past_value;
  if (attention.has_room() && !in_place) {
    // Not a copy: a mask that is too short by mistake would look like room.
    message.Set("past_key has %" PRId64 " places, mask says that %" PRId64
                " tokens are past: a past with room must be the memory of the present, too",
                attention.past_room, attention.past);
    return Fail(node, ort::kInvalidArgument, message.text());
  }
  Session session(node, context);
  return Attend(*node.kernels, attention, &session);
}

constexpr AttentionOperator MakeAttentionOperator(const char* name, bool rotates) {
  AttentionOperator op{};
  op.rotates = rotates;
  FillOperator(name, rotates ? kAttentionInputs : kCos, 3, &op);
  op.CreateKernelV2 = &Create;
  op.KernelComputeV2 = &Compute;
  op.KernelDestroy = &Destroy;
  return op;
}

} // namespace

extern const AttentionOperator kCachedAttention = MakeAttentionOperator("CachedAttention", false);
extern const AttentionOperator kRotaryAttention = MakeAttentionOperator("RotaryAttention", true);

} // namespace blockpress
