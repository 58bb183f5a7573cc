#include "ort_operator.h"

#include <algorithm>
#include <cinttypes>

namespace blockpress {
namespace {

ort::Status* Refuse(const Node& node, const Message& message) {
  return Fail(node, ort::kInvalidArgument, message.text());
}

// Reads type, shape and address of a tensor; `dims` gets at most `capacity` axes.
ort::Status* Describe(const Node& node, const ort::Value* value, ort::ElementType* type, int64_t* rank,
                      int64_t* dims, int64_t capacity, const void** data) {
  const ort::Api* api = node.api;
  if (value == nullptr) return Fail(node, ort::kInvalidArgument, "an input is not given");
  int is_tensor = 0;
  if (auto* status = api->IsTensor(value, &is_tensor)) return status;
  if (is_tensor == 0) return Fail(node, ort::kInvalidArgument, "an input is not a tensor");
  ort::TypeAndShape* info = nullptr;
  if (auto* status = api->GetTensorTypeAndShape(value, &info)) return status;
  size_t count = 0;
  auto* status = api->GetTensorElementType(info, type);
  if (status == nullptr) status = api->GetDimensionsCount(info, &count);
  if (status == nullptr) {
    *rank = static_cast<int64_t>(count);
    const size_t read = *rank < capacity ? count : static_cast<size_t>(capacity);
    status = api->GetDimensions(info, dims, read);
  }
  api->ReleaseTypeAndShape(info);
  if (status != nullptr) return status;
  void* address = nullptr;
  status = api->GetTensorMutableData(const_cast<ort::Value*>(value), &address);
  *data = address;
  return status;
}

ort::Status* Describe(const Node& node, const ort::Value* value, Tensor* tensor) {
  return Describe(node, value, &tensor->type, &tensor->rank, tensor->dims, kMaxRank, &tensor->data);
}

// Checks one weight of an operator and says which one is wrong, where it has several.
ort::Status* CheckInputs(const Kernel& kernel, int number, const Tensor (&inputs)[kWeightInputs], Weight* weight) {
  Message message;
  if (CheckWeight(kernel.attributes, inputs, weight, &message) &&
      (!kernel.op->experts || CheckExperts(*weight, kernel.expert_rows, &message))) {
    return nullptr;
  }
  if (kernel.op->weights == 1) return Refuse(kernel, message);
  Message numbered;
  numbered.Set("weight %d of %d: %s", number + 1, kernel.op->weights, message.text());
  return Refuse(kernel, numbered);
}

// The place of an input of a weight among the operator's inputs.
size_t InputIndex(const Kernel& kernel, int number, int which) {
  return static_cast<size_t>(kernel.op->first_weight() + number * kWeightInputs + which);
}

// Checks the weights where all of them are constant, which ONNX Runtime knows when it creates the kernel.
ort::Status* TakeConstantWeights(Kernel* kernel, const ort::KernelInfo* info) {
  for (int i = 0; i < kernel->op->weights; ++i) {
    Tensor inputs[kWeightInputs];
    for (int which = 0; which < kWeightInputs; ++which) {
      bool constant = false;
      if (auto* status = TakeConstant(*kernel, info, InputIndex(*kernel, i, which), &constant, &inputs[which]))
        return status;
      if (!constant) return nullptr;
    }
    if (auto* status = CheckInputs(*kernel, i, inputs, &kernel->weights[i])) return status;
  }
  kernel->constant = true;
  return nullptr;
}

ort::Status* ReadAttributes(const ort::KernelInfo* info, Kernel* kernel) {
  const ort::Api* api = kernel->api;
  Attributes* attributes = &kernel->attributes;
  if (auto* status = api->KernelInfoGetInt64(info, "format_version", &attributes->format_version)) return status;
  if (auto* status = api->KernelInfoGetInt64(info, "columns", &attributes->columns)) return status;
  if (auto* status = api->KernelInfoGetInt64(info, "group_size", &attributes->group_size)) return status;
  if (auto* status = api->KernelInfoGetInt64(info, "activation_bits", &attributes->activation_bits)) return status;
  Message message;
  if (!CheckAttributes(*attributes, &message)) return Refuse(*kernel, message);
  if (!kernel->op->experts) return nullptr;
  if (auto* status = api->KernelInfoGetInt64(info, "expert_rows", &kernel->expert_rows)) return status;
  return CheckExpertRows(kernel->expert_rows, &message) ? nullptr : Refuse(*kernel, message);
}

} // namespace

ort::Status* Fail(const Node& node, ort::ErrorCode code, const char* message) {
  Message whole;
  whole.Set("%s: %s", node.name, message);
  return node.api->CreateStatus(code, whole.text());
}

ort::Status* TakeTensor(const Node& node, const ort::KernelContext* context, size_t index, Tensor* tensor) {
  const ort::Value* value = nullptr;
  if (auto* status = node.api->KernelContextGetInput(context, index, &value)) return status;
  return Describe(node, value, tensor);
}

ort::Status* TakeConstant(const Node& node, const ort::KernelInfo* info, size_t index, bool* constant, Tensor* tensor) {
  int is_constant = 0;
  const ort::Value* value = nullptr;
  if (auto* status = node.api->KernelInfoGetConstantInput(info, index, &is_constant, &value)) return status;
  *constant = is_constant != 0 && value != nullptr;
  return *constant ? Describe(node, value, tensor) : nullptr;
}

ort::Status* MakeOutput(const Node& node, ort::KernelContext* context, size_t index, const int64_t* dims, size_t rank,
                        float** data) {
  *data = nullptr;
  ort::Value* output = nullptr;
  if (auto* status = node.api->KernelContextGetOutput(context, index, dims, rank, &output)) return status;
  if (std::find(dims, dims + rank, 0) != dims + rank) return nullptr;
  void* memory = nullptr;
  if (auto* status = node.api->GetTensorMutableData(output, &memory)) return status;
  *data = static_cast<float*>(memory);
  return nullptr;
}

ort::Status* TakeInput(const Node& node, const ort::KernelContext* context, size_t index, Input* input) {
  const ort::Value* value = nullptr;
  if (auto* status = node.api->KernelContextGetInput(context, index, &value)) return status;
  return Describe(node, value, &input->type, &input->rank, input->dims, kMostAxes, &input->data);
}

ort::Status* TakeX(const Node& node, const ort::KernelContext* context, int64_t columns, Input* x, int64_t* rows) {
  if (auto* status = TakeInput(node, context, 0, x)) return status;
  Message message;
  if (x->type != ort::kFloat) {
    message.Set("x must be float32, but has element type %d of ONNX", static_cast<int>(x->type));
  } else if (x->rank < 1 || x->rank > kMostAxes) {
    message.Set("x must have 1 to %" PRId64 " axes, but has %" PRId64, kMostAxes, x->rank);
  } else if (x->dims[x->rank - 1] != columns) {
    message.Set("the last axis of x must be %" PRId64 ", but is %" PRId64, columns, x->dims[x->rank - 1]);
  }
  if (!message.empty()) return Refuse(node, message);
  *rows = 1;
  for (int64_t axis = 0; axis < x->rank - 1; ++axis) {
    if (x->dims[axis] == 0) *rows = 0;
  }
  // No overflow: the tensor exists, so that the product of its axes, none of which is 0, fits.
  for (int64_t axis = 0; *rows != 0 && axis < x->rank - 1; ++axis) *rows *= x->dims[axis];
  return nullptr;
}

ort::Status* TakeWeight(const Kernel& kernel, const ort::KernelContext* context, int number, Weight* weight) {
  if (kernel.constant) {
    *weight = kernel.weights[number];
    return nullptr;
  }
  Tensor inputs[kWeightInputs];
  for (int which = 0; which < kWeightInputs; ++which) {
    if (auto* status = TakeTensor(kernel, context, InputIndex(kernel, number, which), &inputs[which])) return status;
  }
  return CheckInputs(kernel, number, inputs, weight);
}

ort::Status* TakeOutput(const Node& node, ort::KernelContext* context, int number, int64_t width, Input* x,
                        float** y) {
  x->dims[x->rank - 1] = width;
  return MakeOutput(node, context, static_cast<size_t>(number), x->dims, static_cast<size_t>(x->rank), y);
}

ort::Status* BLOCKPRESS_ORT_CALL CreateKernel(const ort::CustomOp* op, const ort::Api* api,
                                              const ort::KernelInfo* info, void** result) {
  const auto* of = static_cast<const ProductOperator*>(op);
  Kernel* kernel = nullptr;
  if (auto* status = MakeNode(of->name, api, &kernel)) return status;
  kernel->op = of;
  auto* status = ReadAttributes(info, kernel);
  if (status == nullptr) status = TakeConstantWeights(kernel, info);
  if (status != nullptr) delete kernel;
  else *result = kernel;
  return status;
}

void BLOCKPRESS_ORT_CALL DestroyKernel(void* self) { delete static_cast<Kernel*>(self); }

// The values have five types: "undefined" takes any, and the checks are those above.
ort::ElementType BLOCKPRESS_ORT_CALL InputType(const ort::CustomOp* op, size_t index) {
  constexpr ort::ElementType kTypes[kWeightInputs] = {ort::kUint8, ort::kUndefined, ort::kInt64, ort::kFloat,
                                                      ort::kFloat};
  const auto first = static_cast<size_t>(static_cast<const ProductOperator*>(op)->first_weight());
  if (index >= first) return kTypes[(index - first) % kWeightInputs];
  return index == 0 ? ort::kFloat : ort::kInt64; // x, and which experts its rows go to
}

} // namespace blockpress
