#include "products.h"

#include <algorithm>
#include <cstring>

#include "buffer.h"

namespace blockpress {
namespace {

constexpr int64_t kMaxTasks = 128;
// A run of fewer products, some 30 microseconds of a vector kernel, is not worth waking another thread.
constexpr int64_t kSharedProducts = 1 << 19;
// Products of one task, some microsecond: as a sleeping thread takes long to wake, tasks are small, so that the one
// that is awake can go on with what the other has not begun.
constexpr int64_t kTaskProducts = 1 << 14;
constexpr int64_t kTransposedColumns = 512; // columns of x that one task transposes

struct Run {
  const Kernels* kernels;
  const Products* products;
  Host* host;
  Activations activations; // the rows in the products' order
  float* padded;
  int8_t* quantized;
  int16_t* widened;
  float* steps;
  int8_t* transposed;
  int64_t strips; // of all products, one's behind the other's
  int64_t strips_per_task;
};

const float* Row(const Products& products, int64_t row) {
  return products.x + (products.order == nullptr ? row : products.order[row]) * products.columns;
}

void QuantizeTask(void* argument, size_t index) {
  const Run& run = *static_cast<Run*>(argument);
  const auto row = static_cast<int64_t>(index);
  const int64_t stride = run.activations.stride;
  int8_t* quantized = run.quantized + row * stride;
  run.steps[row] = run.kernels->quantize(Row(*run.products, row), run.products->columns, stride, quantized);
  if (run.widened != nullptr) std::copy_n(quantized, stride, run.widened + row * stride);
  run.kernels->arrange(quantized, stride);
}

void PadTask(void* argument, size_t index) {
  const Run& run = *static_cast<Run*>(argument);
  const auto row = static_cast<int64_t>(index);
  const int64_t columns = run.products->columns, stride = run.activations.stride;
  float* out = run.padded + row * stride;
  std::memcpy(out, Row(*run.products, row), static_cast<size_t>(columns) * sizeof(float));
  std::memset(out + columns, 0, static_cast<size_t>(stride - columns) * sizeof(float));
}

void TransposeTask(void* argument, size_t index) {
  const Run& run = *static_cast<Run*>(argument);
  const int64_t first = static_cast<int64_t>(index) * kTransposedColumns;
  const int64_t last = std::min(first + kTransposedColumns, run.activations.stride);
  Transpose(run.activations, first, last, run.transposed);
}

void MultiplyStrips(const Run& run, const Product& product, int64_t first_strip, int64_t last_strip) {
  const Activations x = run.activations.part(product.first, product.rows);
  run.kernels->multiply(product.weight, x, first_strip, last_strip, product.y);
  if (product.ordered == nullptr) return;
  const int64_t width = product.weight.rows, first = first_strip * kStripRows;
  const int64_t count = std::min(last_strip * kStripRows, width) - first;
  for (int64_t row = 0; row < product.rows; ++row) {
    std::memcpy(product.ordered + run.products->order[product.first + row] * width + first,
                product.y + row * width + first, static_cast<size_t>(count) * sizeof(float));
  }
}

void MultiplyTask(void* argument, size_t index) {
  const Run& run = *static_cast<Run*>(argument);
  const int64_t first = static_cast<int64_t>(index) * run.strips_per_task;
  const int64_t last = std::min(first + run.strips_per_task, run.strips);
  int64_t start = 0; // of the product's strips among all
  for (int64_t i = 0; i < run.products->count; ++i) {
    const Product& product = run.products->of[i];
    const int64_t from = std::max(first - start, int64_t{0});
    const int64_t to = std::min(last - start, product.weight.strips());
    if (from < to) MultiplyStrips(run, product, from, to);
    start += product.weight.strips();
  }
}

ort::Status* ForEach(Run* run, void (*task)(void*, size_t), int64_t count) {
  if (count == 1) {
    task(run, 0);
    return nullptr;
  }
  return run->host->ForEach(task, static_cast<size_t>(count), run);
}

ort::Status* OutOfMemory(Host* host) { return host->Fail(ort::kFail, "out of memory for the rows of x"); }

// The rows once more, columns first, where the kernels want that.
ort::Status* TransposeActivations(Run* run, Buffer* columns) {
  Activations& activations = run->activations;
  bool wanted = false;
  for (int64_t i = 0; i < run->products->count; ++i) {
    const Product& product = run->products->of[i];
    const Activations x = activations.part(product.first, product.rows);
    wanted = wanted || run->kernels->wants_transposed(product.weight, x);
  }
  if (!wanted) return nullptr;
  activations.transposed_width = TransposedWidth(activations.rows);
  run->transposed = columns->AllocateRows<int8_t>(activations.stride, activations.transposed_width, kTransposedRows);
  if (run->transposed == nullptr) return OutOfMemory(run->host);
  activations.transposed = run->transposed;
  return ForEach(run, &TransposeTask, (activations.stride + kTransposedColumns - 1) / kTransposedColumns);
}

// Whether the kernels take the rows of some product from `widened`.
bool WantsWidened(const Run& run) {
  const Product* of = run.products->of;
  return std::any_of(of, of + run.products->count, [&](const Product& product) {
    return product.rows <= run.kernels->widened_rows && product.weight.type == ValueType::kInt8 && !product.weight.dense();
  });
}

// The rows as kernels want them: rounded to int8, in order and padded to whole pieces, or where they are.
ort::Status* PrepareActivations(Run* run, Buffer* rows, Buffer* wide_rows, Buffer* steps) {
  const Products& products = *run->products;
  Activations& activations = run->activations;
  activations.rows = products.rows;
  activations.stride = (products.columns + kPieceColumns - 1) / kPieceColumns * kPieceColumns;
  if (products.rounded) {
    run->quantized = rows->AllocateRows<int8_t>(activations.rows, activations.stride);
    run->steps = steps->Allocate<float>(activations.rows);
    if (run->quantized == nullptr || run->steps == nullptr) return OutOfMemory(run->host);
    if (WantsWidened(*run)) {
      run->widened = wide_rows->AllocateRows<int16_t>(activations.rows, activations.stride);
      if (run->widened == nullptr) return OutOfMemory(run->host);
    }
    activations.quantized = run->quantized;
    activations.widened = run->widened;
    activations.scales = run->steps;
    return ForEach(run, &QuantizeTask, activations.rows);
  }
  if (activations.stride == products.columns && products.order == nullptr) {
    activations.x = products.x;
    return nullptr;
  }
  run->padded = rows->AllocateRows<float>(activations.rows, activations.stride);
  if (run->padded == nullptr) return OutOfMemory(run->host);
  activations.x = run->padded;
  return ForEach(run, &PadTask, activations.rows);
}

int64_t StripsPerTask(int64_t columns, int64_t x_rows, int64_t strips) {
  const int64_t products = kStripRows * columns; // of one strip and one row of x, below 2^35
  const int64_t of_strip = x_rows > INT64_MAX / products ? INT64_MAX : x_rows * products;
  if (of_strip <= kSharedProducts / strips) return strips;
  const int64_t large_enough = of_strip > kTaskProducts ? 1 : kTaskProducts / of_strip;
  const int64_t few_enough = (strips + kMaxTasks - 1) / kMaxTasks;
  return large_enough > few_enough ? large_enough : few_enough;
}

} // namespace

ort::Status* Multiply(const Kernels& kernels, const Products& products, Host* host) {
  Run run{};
  int64_t rows_of_all = 0;
  for (int64_t i = 0; i < products.count; ++i) {
    run.strips += products.of[i].weight.strips();
    rows_of_all += products.of[i].rows;
  }
  if (products.rows == 0 || run.strips == 0) return nullptr;
  run.kernels = &kernels;
  run.products = &products;
  run.host = host;
  const int64_t x_rows = (rows_of_all + products.count - 1) / products.count; // that a strip meets, on the average
  run.strips_per_task = StripsPerTask(products.columns, x_rows, run.strips);
  Buffer rows, wide_rows, steps, columns;
  if (auto* status = PrepareActivations(&run, &rows, &wide_rows, &steps)) return status;
  if (auto* status = TransposeActivations(&run, &columns)) return status;
  return ForEach(&run, &MultiplyTask, (run.strips + run.strips_per_task - 1) / run.strips_per_task);
}

} // namespace blockpress
