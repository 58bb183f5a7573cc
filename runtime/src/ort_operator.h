// The operators as ONNX Runtime sees them, and what they share: attributes, weights, x, outputs and threads.
#pragma once

#include <climits>
#include <cstddef>
#include <cstdint>

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
  int weights;
  bool experts; // whether the weights are those of experts: input 1 then says which

  int first_weight() const { return experts ? 2 : 1; } // among the inputs
};

extern const Operator kSparseMatMul[kMostWeights];
extern const Operator kSparseExpertMatMul;

// A node of a model.
struct Kernel {
  const Operator* op;
  const ort::Api* api;
  const Kernels* kernels;
  Attributes attributes;
  int64_t expert_rows; // 0 where there are no experts
  bool constant;       // the weights are the same at every run, and `weights` holds them, checked
  Weight weights[kMostWeights];
};

// An error of the node, which begins with the operator's name.
ort::Status* Fail(const Kernel& kernel, ort::ErrorCode code, const char* message);

// The threads of a session.
class Session final : public Host {
 public:
  Session(const Kernel& kernel, const ort::KernelContext* context) : kernel_(kernel), context_(context) {}
  ort::Status* ForEach(void (*task)(void*, size_t), size_t count, void* argument) override {
    return kernel_.api->KernelContextParallelFor(context_, task, count, argument);
  }
  ort::Status* Fail(ort::ErrorCode code, const char* message) override {
    return blockpress::Fail(kernel_, code, message);
  }

 private:
  const Kernel& kernel_;
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

ort::Status* TakeInput(const Kernel& kernel, const ort::KernelContext* context, size_t index, Input* input);

// x, checked; `rows` is the product of its leading axes.
ort::Status* TakeX(const Kernel& kernel, const ort::KernelContext* context, Input* x, int64_t* rows);

// A weight of this run: the constant one, or the run's own inputs, checked.
ort::Status* TakeWeight(const Kernel& kernel, const ort::KernelContext* context, int number, Weight* weight);

// Output `number`, of x's leading axes and `width` columns, which takes the place of x's last axis; `y` is null where it
// is empty.
ort::Status* TakeOutput(const Kernel& kernel, ort::KernelContext* context, int number, int64_t width, Input* x,
                        float** y);

ort::Status* BLOCKPRESS_ORT_CALL CreateKernel(const ort::CustomOp* op, const ort::Api* api,
                                              const ort::KernelInfo* info, void** result);
void BLOCKPRESS_ORT_CALL DestroyKernel(void* self);
ort::ElementType BLOCKPRESS_ORT_CALL InputType(const ort::CustomOp* op, size_t index);

constexpr Operator MakeOperator(const char* name, int weights, bool experts,
                                ort::Status*(BLOCKPRESS_ORT_CALL* compute)(void* self, ort::KernelContext*)) {
  Operator op{};
  op.name = name;
  op.weights = weights;
  op.experts = experts;
  op.version = ort::kApiVersion;
  op.GetName = [](const ort::CustomOp* self) { return static_cast<const Operator*>(self)->name; };
  op.GetExecutionProviderType = [](const ort::CustomOp*) -> const char* { return "CPUExecutionProvider"; };
  op.GetInputType = &InputType;
  op.GetInputTypeCount = [](const ort::CustomOp* self) {
    const auto& of = *static_cast<const Operator*>(self);
    return static_cast<size_t>(of.first_weight() + of.weights * kWeightInputs);
  };
  op.GetOutputType = [](const ort::CustomOp*, size_t) { return ort::kFloat; };
  op.GetOutputTypeCount = [](const ort::CustomOp* self) {
    return static_cast<size_t>(static_cast<const Operator*>(self)->weights);
  };
  op.KernelDestroy = &DestroyKernel;
  op.GetInputCharacteristic = [](const ort::CustomOp*, size_t) { return 0; };
  op.GetOutputCharacteristic = [](const ort::CustomOp*, size_t) { return 0; };
  op.GetInputMemoryType = [](const ort::CustomOp*, size_t) { return 0; };
  op.GetVariadicInputMinArity = [](const ort::CustomOp*) { return 1; };
  op.GetVariadicInputHomogeneity = [](const ort::CustomOp*) { return 1; };
  op.GetVariadicOutputMinArity = [](const ort::CustomOp*) { return 1; };
  op.GetVariadicOutputHomogeneity = [](const ort::CustomOp*) { return 1; };
  op.CreateKernelV2 = &CreateKernel;
  op.KernelComputeV2 = compute;
  op.GetStartVersion = [](const ort::CustomOp*) { return 1; };
  op.GetEndVersion = [](const ort::CustomOp*) { return INT_MAX; };
  return op;
}

} // namespace blockpress
