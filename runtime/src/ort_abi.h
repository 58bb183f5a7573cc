// The part of ONNX Runtime's C interface that a custom operator needs, declared by hand: no package ships the headers,
// and the interface only ever grows at its end. Slots are those of the function table of version 17 (ONNX Runtime
// 1.17); every later release answers `GetApi(17)` with them.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(_WIN32) && !defined(_WIN64)
#define BLOCKPRESS_ORT_CALL __stdcall
#else
#define BLOCKPRESS_ORT_CALL
#endif

namespace blockpress::ort {

constexpr uint32_t kApiVersion = 17;

struct Status;
struct Value;
struct KernelContext;
struct KernelInfo;
struct SessionOptions;
struct CustomOpDomain;
struct TypeAndShape;
struct ShapeInferContext;

enum ErrorCode : int { kFail = 1, kInvalidArgument = 2 };

// ONNXTensorElementDataType; the numbers are those of TensorProto.DataType up to here.
enum ElementType : int {
  kUndefined = 0,
  kFloat = 1,
  kUint8 = 2,
  kInt8 = 3,
  kInt64 = 7,
  kFloat16 = 10,
  kBfloat16 = 16,
};

// OrtApi: a table of function pointers, of which these slots are used.
class Api {
 public:
  Status* CreateStatus(ErrorCode code, const char* message) const {
    return Slot<Status*, ErrorCode, const char*>(0)(code, message);
  }
  Status* CreateCustomOpDomain(const char* name, CustomOpDomain** domain) const {
    return Slot<Status*, const char*, CustomOpDomain**>(26)(name, domain);
  }
  Status* CustomOpDomainAdd(CustomOpDomain* domain, const struct CustomOp* op) const {
    return Slot<Status*, CustomOpDomain*, const struct CustomOp*>(27)(domain, op);
  }
  Status* AddCustomOpDomain(SessionOptions* options, CustomOpDomain* domain) const {
    return Slot<Status*, SessionOptions*, CustomOpDomain*>(28)(options, domain);
  }
  Status* IsTensor(const Value* value, int* is_tensor) const {
    return Slot<Status*, const Value*, int*>(50)(value, is_tensor);
  }
  Status* GetTensorMutableData(Value* value, void** data) const {
    return Slot<Status*, Value*, void**>(51)(value, data);
  }
  Status* GetTensorElementType(const TypeAndShape* info, ElementType* type) const {
    return Slot<Status*, const TypeAndShape*, ElementType*>(60)(info, type);
  }
  Status* GetDimensionsCount(const TypeAndShape* info, size_t* count) const {
    return Slot<Status*, const TypeAndShape*, size_t*>(61)(info, count);
  }
  Status* GetDimensions(const TypeAndShape* info, int64_t* dims, size_t count) const {
    return Slot<Status*, const TypeAndShape*, int64_t*, size_t>(62)(info, dims, count);
  }
  Status* GetTensorTypeAndShape(const Value* value, TypeAndShape** info) const {
    return Slot<Status*, const Value*, TypeAndShape**>(65)(value, info);
  }
  Status* KernelInfoGetInt64(const KernelInfo* info, const char* name, int64_t* out) const {
    return Slot<Status*, const KernelInfo*, const char*, int64_t*>(86)(info, name, out);
  }
  Status* KernelInfoGetFloat(const KernelInfo* info, const char* name, float* out) const {
    return Slot<Status*, const KernelInfo*, const char*, float*>(85)(info, name, out);
  }
  Status* KernelContextGetInput(const KernelContext* context, size_t index, const Value** value) const {
    return Slot<Status*, const KernelContext*, size_t, const Value**>(90)(context, index, value);
  }
  Status* KernelContextGetOutput(KernelContext* context, size_t index, const int64_t* dims, size_t count,
                                 Value** value) const {
    return Slot<Status*, KernelContext*, size_t, const int64_t*, size_t, Value**>(91)(context, index, dims, count,
                                                                                     value);
  }
  void ReleaseTypeAndShape(TypeAndShape* info) const { Slot<void, TypeAndShape*>(99)(info); }
  Status* KernelInfoGetConstantInput(const KernelInfo* info, size_t index, int* is_constant,
                                     const Value** value) const {
    return Slot<Status*, const KernelInfo*, size_t, int*, const Value**>(249)(info, index, is_constant, value);
  }
  // Calls task(argument, i) for i from 0 to count - 1 on the session's own threads, and returns after the last.
  Status* KernelContextParallelFor(const KernelContext* context, void (*task)(void*, size_t), size_t count,
                                   void* argument) const {
    return Slot<Status*, const KernelContext*, void (*)(void*, size_t), size_t, size_t, void*>(274)(
        context, task, count, 0, argument);
  }

 private:
  template <typename Result, typename... Arguments>
  using Function = Result(BLOCKPRESS_ORT_CALL*)(Arguments...);

  template <typename Result, typename... Arguments>
  Function<Result, Arguments...> Slot(size_t index) const {
    const auto* table = reinterpret_cast<void* const*>(this);
    return reinterpret_cast<Function<Result, Arguments...>>(table[index]);
  }
};

struct ApiBase {
  const Api*(BLOCKPRESS_ORT_CALL* GetApi)(uint32_t version);
  const char*(BLOCKPRESS_ORT_CALL* GetVersionString)();
};

// OrtCustomOp. The last four are read by releases that see a version of 18 or more.
struct CustomOp {
  uint32_t version;
  void*(BLOCKPRESS_ORT_CALL* CreateKernel)(const CustomOp*, const Api*, const KernelInfo*);
  const char*(BLOCKPRESS_ORT_CALL* GetName)(const CustomOp*);
  const char*(BLOCKPRESS_ORT_CALL* GetExecutionProviderType)(const CustomOp*);
  ElementType(BLOCKPRESS_ORT_CALL* GetInputType)(const CustomOp*, size_t index);
  size_t(BLOCKPRESS_ORT_CALL* GetInputTypeCount)(const CustomOp*);
  ElementType(BLOCKPRESS_ORT_CALL* GetOutputType)(const CustomOp*, size_t index);
  size_t(BLOCKPRESS_ORT_CALL* GetOutputTypeCount)(const CustomOp*);
  void(BLOCKPRESS_ORT_CALL* KernelCompute)(void* kernel, KernelContext*);
  void(BLOCKPRESS_ORT_CALL* KernelDestroy)(void* kernel);
  int(BLOCKPRESS_ORT_CALL* GetInputCharacteristic)(const CustomOp*, size_t index); // 0: required
  int(BLOCKPRESS_ORT_CALL* GetOutputCharacteristic)(const CustomOp*, size_t index);
  int(BLOCKPRESS_ORT_CALL* GetInputMemoryType)(const CustomOp*, size_t index); // 0: the provider's own
  int(BLOCKPRESS_ORT_CALL* GetVariadicInputMinArity)(const CustomOp*);
  int(BLOCKPRESS_ORT_CALL* GetVariadicInputHomogeneity)(const CustomOp*);
  int(BLOCKPRESS_ORT_CALL* GetVariadicOutputMinArity)(const CustomOp*);
  int(BLOCKPRESS_ORT_CALL* GetVariadicOutputHomogeneity)(const CustomOp*);
  Status*(BLOCKPRESS_ORT_CALL* CreateKernelV2)(const CustomOp*, const Api*, const KernelInfo*, void** kernel);
  Status*(BLOCKPRESS_ORT_CALL* KernelComputeV2)(void* kernel, KernelContext*);
  Status*(BLOCKPRESS_ORT_CALL* InferOutputShape)(const CustomOp*, ShapeInferContext*);
  int(BLOCKPRESS_ORT_CALL* GetStartVersion)(const CustomOp*);
  int(BLOCKPRESS_ORT_CALL* GetEndVersion)(const CustomOp*);
  size_t(BLOCKPRESS_ORT_CALL* GetMayInplace)(int** input, int** output);
  void(BLOCKPRESS_ORT_CALL* ReleaseMayInplace)(int* input, int* output);
  size_t(BLOCKPRESS_ORT_CALL* GetAliasMap)(int** input, int** output);
  void(BLOCKPRESS_ORT_CALL* ReleaseAliasMap)(int* input, int* output);
};
static_assert(sizeof(void*) != 8 || sizeof(CustomOp) == 208, "the layout of OrtCustomOp");

} // namespace blockpress::ort
