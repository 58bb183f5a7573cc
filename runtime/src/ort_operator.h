// The operators as ONNX Runtime sees them, and what they share: attributes, weights, x, outputs and threads.
#pragma once

#include <climits>
#include <cstddef>
#include <cstdint>
#include <new>

#include "checks.h"
#include "kernels.h"
#include "message.h"
#include "ort_abi.h"
#include "products.h"
#include "weight.h"

namespace blockpress {

constexpr int kMostWeights = 3; // of one operator

// What ONNX Runtime is given; it hands the address back at every call.
struct Operator : ort::CustomOp {
  const char* name;
  int inputs, outputs;
};

// A product with packed weights.
struct ProductOperator : Operator {
  int weights;
  bool experts; // whether the weights are those of experts: input 1 then says which

  constexpr int first_weight() const { return experts ? 2 : 1; } // among the inputs
};

struct AttentionOperator : Operator {
  bool rotates; // queries and keys, by the tables that are the last two inputs
};

extern const ProductOperator kSparseMatMul[kMostWeights];
extern const ProductOperator kSparseExpertMatMul;
extern const Operator kInt8MatMul;
extern const AttentionOperator kCachedAttention;
extern const AttentionOperator kRotaryAttention;

// A node of a model.
struct Node {
  const char* name; // of its operator
  const ort::Api* api;
  const Kernels* kernels;
};

// One that multiplies by weights.
struct Kernel : Node {
  const ProductOperator* op;
  Attributes attributes;
  int64_t expert_rows; // 0 where there are no experts
  bool constant;       // the weights are the same at every run, and `weights` holds them, checked
  Weight weights[kMostWeights];
};

// An error of the node, which begins with the operator's name.
ort::Status* Fail(const Node& node, ort::ErrorCode code, const char* message);

// The threads of a session.
class Session final : public Host {
 public:
  Session(const Node& node, const ort::KernelContext* context) : node_(node), context_(context) {}
  ort::Status* ForEach(void (*task)(void*, size_t), size_t count, void* argument) override {
    return node_.api->KernelContextParallelFor(context_, task, count, argument);
  }
  ort::Status* Fail(ort::ErrorCode code, const char* message) override {
    return blockpress::Fail(node_, code, message);
  }

 private:
  const Node& node_;
  const ort::KernelContext* context_;
};

constexpr int64_t kMostAxes = 64; // of x

// An input, of which `dims` holds the first kMostAxes axes.
struct Input {
  ort::ElementType type;
  int64_t rank;
  const void* data;
  int64_t dims[kMostAxes];
};

ort::Status* TakeInput(const Node& node, const ort::KernelContext* context, size_t index, Input* input);

// The same of a tensor of at most kMaxRank axes, or of those of another.
ort::Status* TakeTensor(const Node& node, const ort::KernelContext* context, size_t index, Tensor* tensor);

// An input that is the same at every run, where ONNX Runtime knows that it is, at the creation of the node.
ort::Status* TakeConstant(const Node& node, const ort::KernelInfo* info, size_t index, bool* constant, Tensor* tensor);

// Output `index` of this shape; `data` is null where it is empty.
ort::Status* MakeOutput(const Node& node, ort::KernelContext* context, size_t index, const int64_t* dims, size_t rank,
                        float** data);

// x, checked: its last axis is `columns`, and `rows` the product of the others.
ort::Status* TakeX(const Node& node, const ort::KernelContext* context, int64_t columns, Input* x, int64_t* rows);

// A weight of this run: the constant one, or the run's own inputs, checked.
ort::Status* TakeWeight(const Kernel& kernel, const ort::KernelContext* context, int number, Weight* weight);

// Output `number`, of x's leading axes and `width` columns, which takes the place of x's last axis; `y` is null where it
// is empty.
ort::Status* TakeOutput(const Node& node, ort::KernelContext* context, int number, int64_t width, Input* x,
                        float** y);

// What creates and destroys the nodes of products.
ort::Status* BLOCKPRESS_ORT_CALL CreateKernel(const ort::CustomOp* op, const ort::Api* api,
                                              const ort::KernelInfo* info, void** result);
void BLOCKPRESS_ORT_CALL DestroyKernel(void* self);
ort::ElementType BLOCKPRESS_ORT_CALL InputType(const ort::CustomOp* op, size_t index);

// Makes a node with a name and kernels and nothing else yet; an error where there is no memory, or no such kernels.
template <class Made>
ort::Status* MakeNode(const char* name, const ort::Api* api, Made** node) {
  *node = new (std::nothrow) Made{};
  if (*node == nullptr) return api->CreateStatus(ort::kFail, "blockpress-runtime: out of memory");
  const char* error = "";
  (*node)->name = name;
  (*node)->api = api;
  (*node)->kernels = BestKernels(&error);
  if ((*node)->kernels != nullptr) return nullptr;
  delete *node;
  return api->CreateStatus(ort::kInvalidArgument, error);
}

// What all operators have in common.
constexpr void FillOperator(const char* name, int inputs, int outputs, Operator* op) {
  op->name = name;
  op->inputs = inputs;
  op->outputs = outputs;
  op->version = ort::kApiVersion;
  op->GetName = [](const ort::CustomOp* self) { return static_cast<const Operator*>(self)->name; };
  op->GetExecutionProviderType = [](const ort::CustomOp*) -> const char* { return "CPUExecutionProvider"; };
  op->GetInputType = [](const ort::CustomOp*, size_t) { return ort::kFloat; };
  op->GetInputTypeCount = [](const ort::CustomOp* self) {
    return static_cast<size_t>(static_cast<const Operator*>(self)->inputs);
  };
  op->GetOutputType = [](const ort::CustomOp*, size_t) { return ort::kFloat; };
  op->GetOutputTypeCount = [](const ort::CustomOp* self) {
    return static_cast<size_t>(static_cast<const Operator*>(self)->outputs);
  };
  op->GetInputCharacteristic = [](const ort::CustomOp*, size_t) { return 0; };
  op->GetOutputCharacteristic = [](const ort::CustomOp*, size_t) { return 0; };
  op->GetInputMemoryType = [](const ort::CustomOp*, size_t) { return 0; };
  op->GetVariadicInputMinArity = [](const ort::CustomOp*) { return 1; };
  op->GetVariadicInputHomogeneity = [](const ort::CustomOp*) { return 1; };
  op->GetVariadicOutputMinArity = [](const ort::CustomOp*) { return 1; };
  op->GetVariadicOutputHomogeneity = [](const ort::CustomOp*) { return 1; };
  op->GetStartVersion = [](const ort::CustomOp*) { return 1; };
  op->GetEndVersion = [](const ort::CustomOp*) { return INT_MAX; };
}

using ComputeFunction = ort::Status*(BLOCKPRESS_ORT_CALL*)(void* self, ort::KernelContext*);

constexpr ProductOperator MakeProductOperator(const char* name, int weights, bool experts, ComputeFunction compute) {
  ProductOperator op{};
  op.weights = weights;
  op.experts = experts;
  FillOperator(name, op.first_weight() + weights * kWeightInputs, weights, &op);
  op.GetInputType = &InputType;
  op.CreateKernelV2 = &CreateKernel;
  op.KernelComputeV2 = compute;
  op.KernelDestroy = &DestroyKernel;
  return op;
}

} // namespace blockpress
