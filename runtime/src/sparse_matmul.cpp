#include "sparse_matmul.h"

#include <algorithm>
#include <cinttypes>
#include <climits>
#include <cstdlib>
#include <new>

#include "checks.h"
#include "kernels.h"

namespace blockpress {
namespace {

constexpr int kMostWeights = kOperatorCount; // of one operator
constexpr int64_t kMaxTasks = 128;
// A run of fewer products, some 30 microseconds of a vector kernel, is not worth waking another thread.
constexpr int64_t kSharedProducts = 1 << 19;
// Products of one task, some microsecond: as a sleeping thread takes long to wake, tasks are small, so that the one
// that is awake can go on with what the other has not begun.
constexpr int64_t kTaskProducts = 1 << 14;
constexpr int64_t kTransposedColumns = 512; // columns of x that one task transposes

// The weights of an operator, which all have the columns that its attributes say.
struct Weights {
  int count;
  Weight of[kMostWeights];

  int64_t strips() const {
    int64_t strips = 0;
    for (int i = 0; i < count; ++i) strips += of[i].strips();
    return strips;
  }
};

struct Kernel {
  const ort::Api* api;
  const Kernels* kernels;
  Attributes attributes;
  bool constant; // the weights are the same at every run, and `weights` holds them, checked
  Weights weights;
};

// Memory for one run, aligned for vectors. A failed allocation is null.
class Buffer {
 public:
  Buffer() = default;
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { std::free(memory_); }

  void* Allocate(int64_t bytes) {
    memory_ = std::malloc(static_cast<size_t>(bytes) + kAlignment);
    if (memory_ == nullptr) return nullptr;
    const auto address = reinterpret_cast<uintptr_t>(memory_);
    return reinterpret_cast<void*>((address + kAlignment - 1) / kAlignment * kAlignment);
  }

 private:
  static constexpr size_t kAlignment = 64;
  void* memory_ = nullptr;
};

ort::Status* Refuse(const ort::Api* api, const Message& message) {
  return api->CreateStatus(ort::kInvalidArgument, message.text());
}

// Reads type, shape and address of a tensor; `dims` gets at most `capacity` axes.
ort::Status* Describe(const ort::Api* api, const ort::Value* value, ort::ElementType* type, int64_t* rank,
                      int64_t* dims, int64_t capacity, const void** data) {
  if (value == nullptr) return api->CreateStatus(ort::kInvalidArgument, "SparseMatMul: an input is not given");
  int is_tensor = 0;
  if (auto* status = api->IsTensor(value, &is_tensor)) return status;
  if (is_tensor == 0) return api->CreateStatus(ort::kInvalidArgument, "SparseMatMul: an input is not a tensor");
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

ort::Status* Describe(const ort::Api* api, const ort::Value* value, Tensor* tensor) {
  return Describe(api, value, &tensor->type, &tensor->rank, tensor->dims, kMaxRank, &tensor->data);
}

// Checks one weight of an operator and says which one is wrong, where it has several.
ort::Status* TakeWeight(const Kernel& kernel, int number, const Tensor (&inputs)[kWeightInputs], Weight* weight) {
  Message message;
  if (CheckWeight(kernel.attributes, inputs, weight, &message)) return nullptr;
  if (kernel.weights.count == 1) return Refuse(kernel.api, message);
  Message numbered;
  numbered.Set("weight %d of %d: %s", number + 1, kernel.weights.count, message.text());
  return Refuse(kernel.api, numbered);
}

// The place of an input of a weight among the operator's inputs.
size_t InputIndex(int number, int which) { return static_cast<size_t>(1 + number * kWeightInputs + which); }

// Checks the weights where all of them are constant, which ONNX Runtime knows when it creates the kernel.
ort::Status* TakeConstantWeights(Kernel* kernel, const ort::KernelInfo* info) {
  for (int i = 0; i < kernel->weights.count; ++i) {
    Tensor inputs[kWeightInputs];
    for (int which = 0; which < kWeightInputs; ++which) {
      int is_constant = 0;
      const ort::Value* value = nullptr;
      const size_t index = InputIndex(i, which);
      if (auto* status = kernel->api->KernelInfoGetConstantInput(info, index, &is_constant, &value)) return status;
      if (is_constant == 0 || value == nullptr) return nullptr;
      if (auto* status = Describe(kernel->api, value, &inputs[which])) return status;
    }
    if (auto* status = TakeWeight(*kernel, i, inputs, &kernel->weights.of[i])) return status;
  }
  kernel->constant = true;
  return nullptr;
}

// The weights of this run: the constant ones, or the run's own inputs, checked.
ort::Status* TakeWeights(const Kernel& kernel, const ort::KernelContext* context, Weights* weights) {
  *weights = kernel.weights;
  if (kernel.constant) return nullptr;
  for (int i = 0; i < weights->count; ++i) {
    Tensor inputs[kWeightInputs];
    for (int which = 0; which < kWeightInputs; ++which) {
      const ort::Value* value = nullptr;
      if (auto* status = kernel.api->KernelContextGetInput(context, InputIndex(i, which), &value)) return status;
      if (auto* status = Describe(kernel.api, value, &inputs[which])) return status;
    }
    if (auto* status = TakeWeight(kernel, i, inputs, &weights->of[i])) return status;
  }
  return nullptr;
}

// x, its leading axes flattened to `rows`.
struct Input {
  int64_t rank;
  int64_t rows;
  const float* data;
  int64_t dims[64];
};

ort::Status* TakeInput(const Kernel& kernel, const ort::KernelContext* context, Input* x) {
  const ort::Value* value = nullptr;
  if (auto* status = kernel.api->KernelContextGetInput(context, 0, &value)) return status;
  constexpr int64_t kCapacity = sizeof x->dims / sizeof x->dims[0];
  ort::ElementType type;
  const void* data;
  if (auto* status = Describe(kernel.api, value, &type, &x->rank, x->dims, kCapacity, &data)) return status;
  Message message;
  if (type != ort::kFloat) {
    message.Set("SparseMatMul: x must be float32, but has element type %d of ONNX", static_cast<int>(type));
  } else if (x->rank < 1 || x->rank > kCapacity) {
    message.Set("SparseMatMul: x must have 1 to %" PRId64 " axes, but has %" PRId64, kCapacity, x->rank);
  } else if (x->dims[x->rank - 1] != kernel.attributes.columns) {
    message.Set("SparseMatMul: the last axis of x must be %" PRId64 ", but is %" PRId64, kernel.attributes.columns,
                x->dims[x->rank - 1]);
  }
  if (!message.empty()) return Refuse(kernel.api, message);
  x->data = static_cast<const float*>(data);
  x->rows = 1;
  for (int64_t axis = 0; axis < x->rank - 1; ++axis) {
    if (x->dims[axis] == 0) x->rows = 0;
  }
  // No overflow: the tensor exists, so that the product of its axes, none of which is 0, fits.
  for (int64_t axis = 0; x->rows != 0 && axis < x->rank - 1; ++axis) x->rows *= x->dims[axis];
  return nullptr;
}

// One run, cut into tasks for the session's threads.
struct Run {
  const Kernel* kernel;
  const ort::KernelContext* context;
  const Weights* weights;
  Activations activations;
  const float* x;
  int8_t* quantized;
  float* steps;
  int8_t* transposed;
  float* y[kMostWeights];
  int64_t strips; // of all weights, one weight's behind the other's
  int64_t strips_per_task;
};

void QuantizeTask(void* argument, size_t index) {
  const Run& run = *static_cast<Run*>(argument);
  const auto row = static_cast<int64_t>(index);
  const int64_t columns = run.kernel->attributes.columns, stride = run.activations.stride;
  const Kernels& kernels = *run.kernel->kernels;
  run.steps[row] = kernels.quantize(run.x + row * columns, columns, stride, run.quantized + row * stride);
  kernels.arrange(run.quantized + row * stride, stride);
}

void TransposeTask(void* argument, size_t index) {
  const Run& run = *static_cast<Run*>(argument);
  const int64_t first = static_cast<int64_t>(index) * kTransposedColumns;
  const int64_t last = first + kTransposedColumns;
  Transpose(run.activations, first, last < run.activations.stride ? last : run.activations.stride, run.transposed);
}

void MultiplyTask(void* argument, size_t index) {
  const Run& run = *static_cast<Run*>(argument);
  const int64_t first = static_cast<int64_t>(index) * run.strips_per_task;
  const int64_t last = std::min(first + run.strips_per_task, run.strips);
  int64_t start = 0; // of the weight's strips among all
  for (int i = 0; i < run.weights->count; ++i) {
    const Weight& weight = run.weights->of[i];
    const int64_t from = std::max(first - start, int64_t{0});
    const int64_t to = std::min(last - start, weight.strips());
    if (from < to) run.kernel->kernels->multiply(weight, run.activations, from, to, run.y[i]);
    start += weight.strips();
  }
}

ort::Status* ForEach(Run* run, void (*task)(void*, size_t), int64_t count) {
  if (count == 1) {
    task(run, 0);
    return nullptr;
  }
  return run->kernel->api->KernelContextParallelFor(run->context, task, static_cast<size_t>(count), run);
}

ort::Status* OutOfMemory(const Run& run) {
  return run.kernel->api->CreateStatus(ort::kFail, "SparseMatMul: out of memory for the rows of x");
}

// Bytes of `rows` rows of `stride` elements, or -1 where they are beyond 64 bits.
int64_t RowBytes(int64_t rows, int64_t stride, int64_t element) {
  constexpr int64_t kLimit = INT64_MAX / 2;
  return rows > kLimit / (stride * element) ? -1 : rows * stride * element;
}

// The rows of x once more, columns first, where the kernels want that.
ort::Status* TransposeActivations(Run* run, Buffer* columns) {
  Activations& activations = run->activations;
  bool wanted = false;
  for (int i = 0; i < run->weights->count; ++i)
    wanted = wanted || run->kernel->kernels->wants_transposed(run->weights->of[i], activations);
  if (!wanted) return nullptr;
  activations.transposed_width = TransposedWidth(activations.rows);
  const int64_t bytes = RowBytes(activations.stride, activations.transposed_width, 1);
  if (bytes >= 0) run->transposed = static_cast<int8_t*>(columns->Allocate(bytes));
  if (run->transposed == nullptr) return OutOfMemory(*run);
  activations.transposed = run->transposed;
  return ForEach(run, &TransposeTask, (activations.stride + kTransposedColumns - 1) / kTransposedColumns);
}

// The rows of x as kernels want them: rounded to int8, padded to whole pieces, or where they are.
ort::Status* PrepareActivations(Run* run, Buffer* rows, Buffer* steps) {
  Activations& activations = run->activations;
  const int64_t columns = run->kernel->attributes.columns;
  const bool rounded = run->kernel->attributes.activation_bits == 8;
  activations.stride = run->weights->of[0].pieces() * kPieceColumns;
  if (!rounded && activations.stride == columns) {
    activations.x = run->x;
    return nullptr;
  }
  const int64_t bytes = RowBytes(activations.rows, activations.stride, rounded ? 1 : sizeof(float));
  void* memory = bytes < 0 ? nullptr : rows->Allocate(bytes);
  if (rounded) run->steps = static_cast<float*>(steps->Allocate(activations.rows * 4));
  if (memory == nullptr || (rounded && run->steps == nullptr)) return OutOfMemory(*run);
  if (rounded) {
    run->quantized = static_cast<int8_t*>(memory);
    activations.quantized = run->quantized;
    activations.scales = run->steps;
    return ForEach(run, &QuantizeTask, activations.rows);
  }
  auto* padded = static_cast<float*>(memory);
  for (int64_t row = 0; row < activations.rows; ++row) {
    float* out = padded + row * activations.stride;
    std::memcpy(out, run->x + row * columns, static_cast<size_t>(columns) * sizeof(float));
    std::memset(out + columns, 0, static_cast<size_t>(activations.stride - columns) * sizeof(float));
  }
  activations.x = padded;
  return nullptr;
}

int64_t StripsPerTask(int64_t columns, int64_t x_rows, int64_t strips) {
  const int64_t products = kStripRows * columns; // of one strip and one row of x, below 2^35
  const int64_t of_strip = x_rows > INT64_MAX / products ? INT64_MAX : x_rows * products;
  if (of_strip <= kSharedProducts / strips) return strips;
  const int64_t large_enough = of_strip > kTaskProducts ? 1 : kTaskProducts / of_strip;
  const int64_t few_enough = (strips + kMaxTasks - 1) / kMaxTasks;
  return large_enough > few_enough ? large_enough : few_enough;
}

// Output `number`, of x's leading axes and `width` columns; `y` is null where it is empty.
ort::Status* TakeOutput(const Kernel& kernel, ort::KernelContext* context, int number, int64_t width, Input* x,
                        float** y) {
  x->dims[x->rank - 1] = width;
  ort::Value* output = nullptr;
  const auto index = static_cast<size_t>(number), rank = static_cast<size_t>(x->rank);
  if (auto* status = kernel.api->KernelContextGetOutput(context, index, x->dims, rank, &output)) return status;
  if (x->rows == 0 || width == 0) return nullptr;
  void* data = nullptr;
  if (auto* status = kernel.api->GetTensorMutableData(output, &data)) return status;
  *y = static_cast<float*>(data);
  return nullptr;
}

ort::Status* BLOCKPRESS_ORT_CALL Compute(void* self, ort::KernelContext* context) {
  const Kernel& kernel = *static_cast<const Kernel*>(self);
  Input x;
  Weights weights;
  if (auto* status = TakeInput(kernel, context, &x)) return status;
  if (auto* status = TakeWeights(kernel, context, &weights)) return status;
  Run run{};
  for (int i = 0; i < weights.count; ++i) {
    if (auto* status = TakeOutput(kernel, context, i, weights.of[i].rows, &x, &run.y[i])) return status;
  }
  run.strips = weights.strips();
  if (x.rows == 0 || run.strips == 0) return nullptr;

  Buffer rows, steps, columns;
  run.kernel = &kernel;
  run.context = context;
  run.weights = &weights;
  run.activations.rows = x.rows;
  run.x = x.data;
  run.strips_per_task = StripsPerTask(kernel.attributes.columns, x.rows, run.strips);
  if (auto* status = PrepareActivations(&run, &rows, &steps)) return status;
  if (auto* status = TransposeActivations(&run, &columns)) return status;
  return ForEach(&run, &MultiplyTask, (run.strips + run.strips_per_task - 1) / run.strips_per_task);
}

ort::Status* ReadAttributes(const ort::Api* api, const ort::KernelInfo* info, Attributes* attributes) {
  if (auto* status = api->KernelInfoGetInt64(info, "format_version", &attributes->format_version)) return status;
  if (auto* status = api->KernelInfoGetInt64(info, "columns", &attributes->columns)) return status;
  if (auto* status = api->KernelInfoGetInt64(info, "group_size", &attributes->group_size)) return status;
  if (auto* status = api->KernelInfoGetInt64(info, "activation_bits", &attributes->activation_bits)) return status;
  Message message;
  return CheckAttributes(*attributes, &message) ? nullptr : Refuse(api, message);
}

ort::Status* Fill(Kernel* kernel, const ort::KernelInfo* info) {
  const char* error = "";
  kernel->kernels = BestKernels(&error);
  if (kernel->kernels == nullptr) return kernel->api->CreateStatus(ort::kInvalidArgument, error);
  if (auto* status = ReadAttributes(kernel->api, info, &kernel->attributes)) return status;
  return TakeConstantWeights(kernel, info);
}

template <int count>
ort::Status* BLOCKPRESS_ORT_CALL CreateKernel(const ort::CustomOp*, const ort::Api* api, const ort::KernelInfo* info,
                                              void** result) {
  auto* kernel = new (std::nothrow) Kernel{};
  if (kernel == nullptr) return api->CreateStatus(ort::kFail, "SparseMatMul: out of memory");
  kernel->api = api;
  kernel->weights.count = count;
  if (auto* status = Fill(kernel, info)) {
    delete kernel;
    return status;
  }
  *result = kernel;
  return nullptr;
}

void BLOCKPRESS_ORT_CALL DestroyKernel(void* self) { delete static_cast<Kernel*>(self); }

// The values have five types: "undefined" takes any, and the checks are those above.
ort::ElementType BLOCKPRESS_ORT_CALL InputType(const ort::CustomOp*, size_t index) {
  constexpr ort::ElementType kTypes[kWeightInputs] = {ort::kUint8, ort::kUndefined, ort::kInt64, ort::kFloat,
                                                      ort::kFloat};
  return index == 0 ? ort::kFloat : kTypes[(index - 1) % kWeightInputs];
}

constexpr const char* kOperators[kMostWeights] = {"SparseMatMul", "SparseMatMul2", "SparseMatMul3"};

// The operator that multiplies x by `count` weights.
template <int count> constexpr ort::CustomOp MakeOperator() {
  ort::CustomOp op{};
  op.version = ort::kApiVersion;
  op.GetName = [](const ort::CustomOp*) -> const char* { return kOperators[count - 1]; };
  op.GetExecutionProviderType = [](const ort::CustomOp*) -> const char* { return "CPUExecutionProvider"; };
  op.GetInputType = &InputType;
  op.GetInputTypeCount = [](const ort::CustomOp*) -> size_t { return InputIndex(count, 0); };
  op.GetOutputType = [](const ort::CustomOp*, size_t) { return ort::kFloat; };
  op.GetOutputTypeCount = [](const ort::CustomOp*) -> size_t { return count; };
  op.KernelDestroy = &DestroyKernel;
  op.GetInputCharacteristic = [](const ort::CustomOp*, size_t) { return 0; };
  op.GetOutputCharacteristic = [](const ort::CustomOp*, size_t) { return 0; };
  op.GetInputMemoryType = [](const ort::CustomOp*, size_t) { return 0; };
  op.GetVariadicInputMinArity = [](const ort::CustomOp*) { return 1; };
  op.GetVariadicInputHomogeneity = [](const ort::CustomOp*) { return 1; };
  op.GetVariadicOutputMinArity = [](const ort::CustomOp*) { return 1; };
  op.GetVariadicOutputHomogeneity = [](const ort::CustomOp*) { return 1; };
  op.CreateKernelV2 = &CreateKernel<count>;
  op.KernelComputeV2 = &Compute;
  op.GetStartVersion = [](const ort::CustomOp*) { return 1; };
  op.GetEndVersion = [](const ort::CustomOp*) { return INT_MAX; };
  return op;
}

} // namespace

extern const ort::CustomOp kSparseMatMul[kOperatorCount] = {MakeOperator<1>(), MakeOperator<2>(), MakeOperator<3>()};

} // namespace blockpress
