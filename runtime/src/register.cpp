// What the library exports.

#include "kernels.h"
#include "message.h"
#include "ort_abi.h"
#include "ort_operator.h"

#if defined(_WIN32)
#define BLOCKPRESS_EXPORT extern "C" __declspec(dllexport)
#else
#define BLOCKPRESS_EXPORT extern "C" __attribute__((visibility("default")))
#endif

namespace ort = blockpress::ort;

// What ONNX Runtime calls when a library of custom operators is registered with session options.
BLOCKPRESS_EXPORT ort::Status* BLOCKPRESS_ORT_CALL RegisterCustomOps(ort::SessionOptions* options,
                                                                     const ort::ApiBase* base) {
  const ort::Api* api = base->GetApi(ort::kApiVersion);
  if (api == nullptr) {
    blockpress::Message message;
    message.Set("blockpress-runtime needs ONNX Runtime 1.17 or newer; this is %s", base->GetVersionString());
    return base->GetApi(1)->CreateStatus(ort::kFail, message.text());
  }
  // The options keep the domain's address, and nothing says when they end: a domain for each, never freed.
  ort::CustomOpDomain* domain = nullptr;
  if (auto* status = api->CreateCustomOpDomain("blockpress", &domain)) return status;
  using blockpress::kSparseMatMul;
  const blockpress::Operator* const operators[] = {
      &kSparseMatMul[0],          &kSparseMatMul[1], &kSparseMatMul[2], &blockpress::kSparseExpertMatMul,
      &blockpress::kInt8MatMul,
      &blockpress::kCachedAttention, &blockpress::kRotaryAttention};
  for (const blockpress::Operator* op : operators) {
    if (auto* status = api->CustomOpDomainAdd(domain, op)) return status;
  }
  return api->AddCustomOpDomain(options, domain);
}

// The version of this library.
BLOCKPRESS_EXPORT const char* BlockpressRuntimeVersion() { return BLOCKPRESS_RUNTIME_VERSION; }

// The name of the kernels that a session made now would use; null where BLOCKPRESS_RUNTIME_ISA asks for others than
// this machine runs.
BLOCKPRESS_EXPORT const char* BlockpressRuntimeIsa() {
  const char* error = "";
  const blockpress::Kernels* kernels = blockpress::BestKernels(&error);
  return kernels == nullptr ? nullptr : kernels->name;
}
