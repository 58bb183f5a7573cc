// SparseExpertMatMul: each row of x times the weight of the expert that it goes to.

#include <algorithm>
#include <cinttypes>

#include "experts.h"
#include "ort_operator.h"

namespace blockpress {
namespace {

// Which expert each row of x goes to. The numbers are checked where they are used.
ort::Status* TakeExperts(const Kernel& kernel, const ort::KernelContext* context, const Input& x,
                         const int64_t** experts) {
  Input input;
  if (auto* status = TakeInput(kernel, context, 1, &input)) return status;
  const int64_t axes = x.rank - 1;
  Message message;
  if (input.type != ort::kInt64) {
    message.Set("experts must be int64, but has element type %d of ONNX", static_cast<int>(input.type));
  } else if (input.rank != axes) {
    message.Set("experts must have the %" PRId64 " leading axes of x, but has %" PRId64 " axes", axes, input.rank);
  } else if (reinterpret_cast<uintptr_t>(input.data) % sizeof(int64_t) != 0) {
    message.Set("experts lies at an address that is no multiple of 8 bytes");
  } else if (!std::equal(x.dims, x.dims + axes, input.dims)) {
    const auto axis = std::mismatch(x.dims, x.dims + axes, input.dims).first - x.dims;
    message.Set("axis %d of experts must be %" PRId64 " as that of x, but is %" PRId64, static_cast<int>(axis),
                x.dims[axis], input.dims[axis]);
  }
  if (!message.empty()) return Fail(kernel, ort::kInvalidArgument, message.text());
  *experts = static_cast<const int64_t*>(input.data);
  return nullptr;
}

ort::Status* BLOCKPRESS_ORT_CALL Compute(void* self, ort::KernelContext* context) {
  const Kernel& kernel = *static_cast<const Kernel*>(self);
  Input x;
  ExpertProducts products;
  if (auto* status = TakeX(kernel, context, kernel.attributes.columns, &x, &products.rows)) return status;
  if (auto* status = TakeExperts(kernel, context, x, &products.experts)) return status;
  if (auto* status = TakeWeight(kernel, context, 0, &products.weight)) return status;
  if (auto* status = TakeOutput(kernel, context, 0, kernel.expert_rows, &x, &products.y)) return status;
  products.expert_rows = kernel.expert_rows;
  products.x = static_cast<const float*>(x.data);
  products.rounded = kernel.attributes.activation_bits == 8;
  Session session(kernel, context);
  return MultiplyExperts(*kernel.kernels, products, &session);
}

} // namespace

extern const ProductOperator kSparseExpertMatMul = MakeProductOperator("SparseExpertMatMul", 1, true, &Compute);

} // namespace blockpress
