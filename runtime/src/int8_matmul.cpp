// Int8MatMul: x times a matrix of int8 of which every weight is stored, as that of a language model's head.

#include "dense_weight.h"
#include "ort_operator.h"

namespace blockpress {
namespace {

constexpr int kFirstInput = 1; // of the weight, behind x

struct DenseNode : Node {
  int64_t activation_bits;
  bool constant; // the weight is the same at every run, and `weight` is it, checked
  Weight weight;
  DenseParts parts;
};

ort::Status* MakeWeight(const DenseNode& node, const Tensor (&inputs)[kDenseInputs], DenseParts* parts,
                        Weight* weight) {
  Message message;
  if (parts->Make(inputs, node.activation_bits, weight, &message)) return nullptr;
  return Fail(node, ort::kInvalidArgument, message.text());
}

ort::Status* TakeConstantWeight(const ort::KernelInfo* info, DenseNode* node) {
  Tensor inputs[kDenseInputs];
  for (int which = 0; which < kDenseInputs; ++which) {
    bool constant = false;
    if (auto* status = TakeConstant(*node, info, static_cast<size_t>(kFirstInput + which), &constant, &inputs[which]))
      return status;
    if (!constant) return nullptr;
  }
  node->constant = true;
  return MakeWeight(*node, inputs, &node->parts, &node->weight);
}

ort::Status* Fill(const ort::KernelInfo* info, DenseNode* node) {
  if (auto* status = node->api->KernelInfoGetInt64(info, "activation_bits", &node->activation_bits)) return status;
  Message message;
  if (!CheckActivationBits(node->activation_bits, &message))
    return Fail(*node, ort::kInvalidArgument, message.text());
  return TakeConstantWeight(info, node);
}

ort::Status* BLOCKPRESS_ORT_CALL Create(const ort::CustomOp* op, const ort::Api* api, const ort::KernelInfo* info,
                                        void** result) {
  DenseNode* node = nullptr;
  if (auto* status = MakeNode(static_cast<const Operator*>(op)->name, api, &node)) return status;
  auto* status = Fill(info, node);
  if (status != nullptr) delete node;
  else *result = node;
  return status;
}

void BLOCKPRESS_ORT_CALL Destroy(void* self) { delete static_cast<DenseNode*>(self); }

ort::Status* TakeWeight(const DenseNode& node, const ort::KernelContext* context, DenseParts* parts, Weight* weight) {
  if (node.constant) {
    *weight = node.weight;
    return nullptr;
  }
  Tensor inputs[kDenseInputs];
  for (int which = 0; which < kDenseInputs; ++which) {
    if (auto* status = TakeTensor(node, context, static_cast<size_t>(kFirstInput + which), &inputs[which]))
      return status;
  }
  return MakeWeight(node, inputs, parts, weight);
}

ort::Status* BLOCKPRESS_ORT_CALL Compute(void* self, ort::KernelContext* context) {
  const auto& node = *static_cast<const DenseNode*>(self);
  DenseParts parts;
  Product product{};
  Input x;
  if (auto* status = TakeWeight(node, context, &parts, &product.weight)) return status;
  const int64_t columns = product.weight.columns;
  if (auto* status = TakeX(node, context, columns, &x, &product.rows)) return status;
  if (auto* status = TakeOutput(node, context, 0, product.weight.rows, &x, &product.y)) return status;
  Session session(node, context);
  return Multiply(*node.kernels,
                  {static_cast<const float*>(x.data), product.rows, columns, node.activation_bits == 8, nullptr,
                   &product, 1},
                  &session);
}

ort::ElementType BLOCKPRESS_ORT_CALL TypeOfInput(const ort::CustomOp*, size_t index) {
  return index == kFirstInput + kDenseValues ? ort::kInt8 : ort::kFloat;
}

constexpr Operator MakeOperator() {
  Operator op{};
  FillOperator("Int8MatMul", kFirstInput + kDenseInputs, 1, &op);
  op.GetInputType = &TypeOfInput;
  op.CreateKernelV2 = &Create;
  op.KernelComputeV2 = &Compute;
  op.KernelDestroy = &Destroy;
  return op;
}

} // namespace

extern const Operator kInt8MatMul = MakeOperator();

} // namespace blockpress
