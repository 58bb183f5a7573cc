// Runs every kernel set of this machine on random packed matrices, and on damaged ones, with the address and
// undefined-behaviour sanitizers in. Each tensor is a block of memory of exactly its length; what is right is computed
// from the weights as they were before they were packed.
//
//   driver --rounds N --seed S [--isa NAME]

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "checks.h"
#include "dense_weight.h"
#include "experts.h"
#include "fuzz_attention.h"
#include "fuzz_tools.h"
#include "kernels.h"

namespace blockpress {
namespace {

// The bytes of the tensors before they are laid out, which may then be damaged.
struct Packed {
  ValueType type = ValueType::kFloat32;
  Attributes attributes{1, 1, 0, 32};
  int64_t rows = 1;
  std::vector<uint8_t> mask, values;
  std::vector<int64_t> offsets;
  std::vector<float> scales, bias;
  int64_t scale_rows = 1, scale_columns = 1;
  std::vector<double> dense; // (rows, columns): what the bits stand for, without the scales
};

template <typename T>
Block Copy(Random& random, const std::vector<T>& from, size_t alignment) {
  Block block(random, from.size() * sizeof(T), alignment);
  if (!from.empty()) std::memcpy(block.as<uint8_t>(), from.data(), from.size() * sizeof(T));
  return block;
}

// The tensors in memory of their own.
class Laid {
 public:
  Laid(Random& random, const Packed& packed)
      : mask_(Copy(random, packed.mask, 1)),
        values_(Copy(random, packed.values, static_cast<size_t>(ElementBytes(packed.type)))),
        offsets_(Copy(random, packed.offsets, 8)),
        scales_(Copy(random, packed.scales, 4)),
        bias_(Copy(random, packed.bias, 4)) {
    static constexpr ort::ElementType kTypes[] = {ort::kFloat, ort::kFloat16, ort::kBfloat16, ort::kInt8, ort::kUint8};
    const int64_t mask_columns = packed.rows == 0 ? 1 : static_cast<int64_t>(packed.mask.size()) / packed.rows;
    const int64_t elements = static_cast<int64_t>(packed.values.size()) / ElementBytes(packed.type);
    tensors[kMask] = {ort::kUint8, 2, {packed.rows, mask_columns}, mask_.as<void>()};
    tensors[kValues] = {kTypes[static_cast<int>(packed.type)], 1, {elements}, values_.as<void>()};
    tensors[kOffsets] = {ort::kInt64, 1, {static_cast<int64_t>(packed.offsets.size())}, offsets_.as<void>()};
    tensors[kScales] = {ort::kFloat, 2, {packed.scale_rows, packed.scale_columns}, scales_.as<void>()};
    tensors[kBias] = {ort::kFloat, 1, {static_cast<int64_t>(packed.bias.size())}, bias_.as<void>()};
  }

  Tensor tensors[kWeightInputs];

 private:
  Block mask_, values_, offsets_, scales_, bias_;
};

void Append(std::vector<uint8_t>* bytes, uint32_t bits, int64_t count) {
  for (int64_t i = 0; i < count; ++i) bytes->push_back(static_cast<uint8_t>(bits >> (8 * i)));
}

// The bits of a stored weight; for int4 a half byte.
uint32_t RandomStored(Random& random, ValueType type) {
  const float normal = Normal(random);
  uint32_t bits;
  std::memcpy(&bits, &normal, 4);
  switch (type) {
    case ValueType::kFloat32: return bits;
    case ValueType::kBfloat16: return bits >> 16;
    case ValueType::kFloat16: // exponents 0 (subnormal) to 17, no infinities
      return static_cast<uint32_t>(Between(random, 0, 1) << 15 | Between(random, 0, 17) << 10 |
                                   Between(random, 0, 1023));
    case ValueType::kInt8: return static_cast<uint8_t>(Between(random, -127, 127));
    case ValueType::kInt4: return static_cast<uint32_t>(Between(random, 1, 15));
  }
  return 0;
}

double Decoded(ValueType type, uint32_t bits) {
  if (type == ValueType::kInt8) return static_cast<int8_t>(bits);
  if (type == ValueType::kInt4) return static_cast<double>(bits) - 8;
  if (type == ValueType::kFloat16) {
    const int exponent = bits >> 10 & 31;
    const double fraction = bits & 1023;
    const double size = exponent == 0 ? std::ldexp(fraction, -24) : std::ldexp(1024 + fraction, exponent - 25);
    return bits >> 15 != 0 ? -size : size;
  }
  const uint32_t whole = type == ValueType::kBfloat16 ? bits << 16 : bits;
  float value;
  std::memcpy(&value, &whole, 4);
  return value;
}

void PackRow(Random& random, double density, Packed* packed) {
  const int64_t columns = packed->attributes.columns;
  const size_t start = packed->mask.size();
  packed->mask.resize(start + static_cast<size_t>((columns + 7) / 8));
  std::bernoulli_distribution kept(density);
  for (int64_t piece = 0; piece < columns; piece += kPieceColumns) {
    std::vector<uint32_t> stored;
    for (int64_t k = piece; k < columns && k < piece + kPieceColumns; ++k) {
      packed->dense.push_back(0);
      if (!kept(random)) continue;
      packed->mask[start + static_cast<size_t>(k / 8)] |= static_cast<uint8_t>(1 << (k % 8));
      stored.push_back(RandomStored(random, packed->type));
      packed->dense.back() = Decoded(packed->type, stored.back());
    }
    if (packed->type != ValueType::kInt4) {
      for (uint32_t bits : stored) Append(&packed->values, bits, ElementBytes(packed->type));
      continue;
    }
    if (stored.size() % 2 != 0) stored.push_back(8);
    for (size_t i = 0; i < stored.size(); i += 2) Append(&packed->values, stored[i] | stored[i + 1] << 4, 1);
  }
}

double RandomDensity(Random& random) {
  const int64_t choice = Between(random, 0, 5);
  return choice == 0 ? 0 : choice == 1 ? 1 : std::uniform_real_distribution<double>()(random);
}

// Of so many rows, or of any number of them where that is 0.
Packed RandomPacked(Random& random, int64_t rows) {
  Packed packed;
  packed.type = static_cast<ValueType>(Between(random, 0, 4));
  const bool wide = Between(random, 0, 15) == 0; // columns for several tiles
  packed.rows = rows != 0 ? rows : Between(random, 1, wide ? 20 : 300);
  packed.attributes.columns = wide ? Between(random, 301, 4000) : Between(random, 1, 300);
  if (Between(random, 0, 3) == 0) packed.attributes.columns = (packed.attributes.columns + 63) / 64 * 64; // as usual
  const bool integers = packed.type == ValueType::kInt8 || packed.type == ValueType::kInt4;
  if (integers) packed.attributes.activation_bits = Between(random, 0, 1) == 0 ? 32 : 8;
  if (integers) packed.attributes.group_size = 64 * Between(random, 0, 3);
  const double density = RandomDensity(random);
  const bool own_densities = Between(random, 0, 3) == 0; // else every row has the matrix's
  packed.offsets.push_back(0);
  for (int64_t row = 0; row < packed.rows; ++row) {
    PackRow(random, own_densities ? RandomDensity(random) : density, &packed);
    if (row % kStripRows == kStripRows - 1 || row == packed.rows - 1) {
      packed.offsets.push_back(static_cast<int64_t>(packed.values.size()) / ElementBytes(packed.type));
    }
  }
  // The format says zeros here; no kernel may depend on it.
  for (int64_t i = 0; i < kPaddingBytes; ++i) Append(&packed.values, static_cast<uint32_t>(random()), 1);
  if (integers && Between(random, 0, 4) != 0) {
    const int64_t group = packed.attributes.group_size;
    packed.scale_rows = packed.rows;
    packed.scale_columns = group == 0 ? 1 : (packed.attributes.columns + group - 1) / group;
  }
  packed.scales.resize(static_cast<size_t>(packed.scale_rows * packed.scale_columns), 1.0f);
  if (integers) {
    for (float& scale : packed.scales) scale = 0.01f + std::fabs(Normal(random));
  }
  packed.bias.resize(Between(random, 0, 1) == 0 ? 1 : static_cast<size_t>(packed.rows));
  for (float& bias : packed.bias) bias = Normal(random);
  return packed;
}

// Breaks something that a reader must notice, or that leads nowhere; the memory is still what the shapes say.
void Damage(Random& random, Packed* packed) {
  const auto any = [&](size_t size) { return static_cast<size_t>(Between(random, 0, static_cast<int64_t>(size) - 1)); };
  const int64_t change = Between(random, 0, 1) == 0 ? 1 : -1;
  switch (Between(random, 0, 9)) {
    case 0: packed->mask[any(packed->mask.size())] ^= static_cast<uint8_t>(1 << Between(random, 0, 7)); break;
    case 1: packed->mask[any(packed->mask.size())] = static_cast<uint8_t>(random()); break;
    case 2: packed->offsets[any(packed->offsets.size())] += change; break;
    case 3: packed->offsets[any(packed->offsets.size())] = static_cast<int64_t>(random()); break;
    case 4: packed->offsets.resize(packed->offsets.size() + static_cast<size_t>(change)); break;
    case 5: { // fewer or more values
      const size_t bytes = static_cast<size_t>(ElementBytes(packed->type) * Between(random, 1, 80));
      packed->values.resize(change > 0 ? packed->values.size() + bytes
                                       : packed->values.size() - std::min(bytes, packed->values.size()));
      break;
    }
    case 6: packed->scale_rows += change; break;
    case 7: packed->scale_columns += change; break;
    case 8: packed->bias.resize(static_cast<size_t>(Between(random, 0, 300))); break;
    default: packed->attributes.columns = std::max<int64_t>(1, packed->attributes.columns + Between(random, -70, 70));
  }
  packed->scales.resize(static_cast<size_t>(std::max<int64_t>(0, packed->scale_rows * packed->scale_columns)));
  if (Between(random, 0, 3) == 0) { // any bytes may stand for values
    for (uint8_t& byte : packed->values) byte = static_cast<uint8_t>(random());
  }
}

// One row of x; of rare kinds those that are hard to round to int8.
void FillRow(Random& random, bool finite, int64_t columns, float* x) {
  const int64_t kind = Between(random, 0, finite ? 7 : 9);
  for (int64_t k = 0; k < columns; ++k) {
    x[k] = kind == 0 ? 0.0f
         : kind == 1 ? static_cast<float>(Between(random, -254, 254)) * 0.5f // ties, the step is 1 where 127 comes
         : kind == 2 ? Normal(random) * 1e-42f
         : kind == 3 ? Normal(random) * 1e30f
                     : Normal(random);
  }
  if (kind == 1) x[0] = 127;
  if (kind == 8) x[Between(random, 0, columns - 1)] = NAN;
  if (kind == 9) x[Between(random, 0, columns - 1)] = -INFINITY;
}

// Rows of X: few, for tiles, and for small matrices sometimes more than one walk over W serves.
int64_t RandomRows(Random& random, const Weight& weight) {
  const int64_t choice = Between(random, 0, 5);
  if (choice == 0 && weight.rows * weight.columns < 2000) return Between(random, 500, 600);
  return choice < 2 ? Between(random, 16, 40) : Between(random, 1, 9);
}

// X as the kernels get it, rounded by the kernels under test where it is.
struct Inputs {
  Inputs(Random& random, const Weight& weight, const Attributes& attributes, const Kernels& kernels)
      : in_parts(Between(random, 0, 1) == 0),
        rows(RandomRows(random, weight)),
        stride(weight.pieces() * kPieceColumns),
        x(random, static_cast<size_t>(rows * stride) * 4, 4),
        quantized(random, static_cast<size_t>(rows * stride), 1),
        steps(random, static_cast<size_t>(rows) * 4, 4) {
    const bool rounded = attributes.activation_bits == 8;
    for (int64_t row = 0; row < rows; ++row) {
      FillRow(random, !rounded, weight.columns, x.as<float>() + row * stride);
      if (rounded) same = Round(random, weight.columns, row, kernels) && same;
    }
    if (rounded) in_order.assign(quantized.as<int8_t>(), quantized.as<int8_t>() + rows * stride);
    if (rounded && kernels.widened_rows != 0) {
      widened = std::make_unique<Block>(random, static_cast<size_t>(rows * stride) * 2, 2);
      std::copy(in_order.begin(), in_order.end(), widened->as<int16_t>());
    }
    for (int64_t row = 0; rounded && row < rows; ++row) kernels.arrange(quantized.as<int8_t>() + row * stride, stride);
    activations = {rows, stride, rounded ? nullptr : x.as<float>(), rounded ? quantized.as<int8_t>() : nullptr,
                   widened ? widened->as<int16_t>() : nullptr, rounded ? steps.as<float>() : nullptr, nullptr, 0};
    if (!kernels.wants_transposed(weight, activations)) return;
    activations.transposed_width = TransposedWidth(rows);
    const int64_t bytes = stride * activations.transposed_width + (in_parts ? kTransposedRows : 0);
    transposed = std::make_unique<Block>(random, static_cast<size_t>(bytes), 1);
    Transpose(activations, 0, stride, transposed->as<int8_t>());
    activations.transposed = transposed->as<int8_t>();
  }

  // Whether the kernels round the row as the scalar ones do.
  bool Round(Random& random, int64_t columns, int64_t row, const Kernels& kernels) {
    Block exact(random, static_cast<size_t>(columns) * 4, 4), expected(random, static_cast<size_t>(stride), 1);
    std::memcpy(exact.as<float>(), x.as<float>() + row * stride, static_cast<size_t>(columns) * 4);
    int8_t* out = quantized.as<int8_t>() + row * stride;
    std::memset(out, 77, static_cast<size_t>(stride));
    const float step = kernels.quantize(exact.as<float>(), columns, stride, out);
    const float wanted = kScalarKernels.quantize(exact.as<float>(), columns, stride, expected.as<int8_t>());
    steps.as<float>()[row] = step;
    return (step == wanted || (std::isnan(step) && std::isnan(wanted))) &&
           std::memcmp(out, expected.as<int8_t>(), static_cast<size_t>(stride)) == 0;
  }

  double at(int64_t row, int64_t column) const {
    const int64_t i = row * stride + column;
    return activations.x != nullptr ? static_cast<double>(activations.x[i]) : in_order[static_cast<size_t>(i)];
  }

  // The rows that meet the weight: all, or some that begin anywhere, often up to the last.
  int64_t RandomFirst(Random& random) const { return in_parts ? Between(random, 0, rows - 1) : 0; }
  int64_t RandomCount(Random& random, int64_t first) const {
    return in_parts && Between(random, 0, 1) == 0 ? Between(random, 1, rows - first) : rows - first;
  }

  bool in_parts;
  int64_t rows, stride;
  Block x, quantized, steps;
  std::vector<int8_t> in_order; // `quantized` by columns, before the kernels arrange it
  std::unique_ptr<Block> widened, transposed;
  Activations activations;
  bool same = true;
};

// What an output must be, and the sum of the sizes of its terms.
struct Exact {
  double sum, terms;
};

Exact ExactOutput(const Packed& packed, const Weight& weight, const Inputs& inputs, int64_t m, int64_t n) {
  const double bias = static_cast<double>(weight.row_bias(n));
  Exact exact = {bias, std::fabs(bias)};
  const float* steps = inputs.activations.scales;
  const double step = steps == nullptr ? 1 : static_cast<double>(steps[m]);
  if (std::isnan(step)) return {NAN, NAN};
  for (int64_t k = 0; k < weight.columns; ++k) {
    const double scale = static_cast<double>(weight.row_scales(n)[k / weight.group_size]);
    const double term = packed.dense[static_cast<size_t>(n * weight.columns + k)] * scale * inputs.at(m, k) * step;
    exact.sum += term;
    exact.terms += std::fabs(term);
  }
  return exact;
}

// Multiplies in random ranges of strips; whether each range left the rows outside of it alone.
bool MultiplyInRanges(Random& random, const Kernels& kernels, const Weight& weight, const Activations& activations,
                      float* y) {
  const int64_t strips = (weight.rows + kStripRows - 1) / kStripRows;
  std::fill(y, y + activations.rows * weight.rows, kUntouched);
  bool alone = true;
  for (int64_t first = 0; first < strips;) {
    const int64_t last = Between(random, first + 1, strips);
    kernels.multiply(weight, activations, first, last, y);
    for (int64_t i = 0; i < activations.rows * weight.rows; ++i) {
      if (i % weight.rows >= last * kStripRows && y[i] != kUntouched) alone = false;
    }
    first = last;
  }
  return alone;
}

// Compares the outputs of `count` rows of X from `first` on with the exact ones, `width` of each: those of the first rows
// of W, or of the row's own expert. Returns what is wrong, or nothing.
std::string CompareOutputs(const Packed& packed, const Weight& weight, const Inputs& inputs, int64_t first,
                           int64_t count, int64_t width, const int64_t* experts, const float* y, double* worst) {
  for (int64_t i = 0; i < count * width; ++i) {
    const int64_t m = first + i / width;
    const Exact exact = ExactOutput(packed, weight, inputs, m, (experts == nullptr ? 0 : experts[m] * width) + i % width);
    if (std::isnan(exact.sum)) {
      if (!std::isnan(y[i])) return "a row with a NaN or an infinity gives a number";
      continue;
    }
    if (exact.terms > 1e38) continue; // float may overflow on the way
    // Products of subnormal numbers are lost in float.
    const double error = std::fabs(static_cast<double>(y[i]) - exact.sum) / (exact.terms + 1e-30);
    if (!(error <= kTolerance)) {
      return "output " + std::to_string(i) + " is " + std::to_string(y[i]) + ", not " + std::to_string(exact.sum);
    }
    *worst = std::max(*worst, error);
  }
  return "";
}

bool Check(const Packed& packed, const Laid& laid, Weight* weight, Message* message) {
  return CheckAttributes(packed.attributes, message) &&
         CheckWeight(packed.attributes, laid.tensors, weight, message);
}

// Multiplies one good matrix; returns what is wrong, or nothing.
std::string Compare(Random& random, const Kernels& kernels, const Packed& packed, double* worst) {
  const Laid laid(random, packed);
  Weight weight;
  Message message;
  if (!Check(packed, laid, &weight, &message)) return std::string("a good matrix is refused: ") + message.text();
  const Inputs inputs(random, weight, packed.attributes, kernels);
  if (!inputs.same) return "x is rounded to other integers or another step";
  const int64_t first = inputs.RandomFirst(random), count = inputs.RandomCount(random, first);
  const Block y(random, static_cast<size_t>(count * weight.rows) * 4, 4);
  if (!MultiplyInRanges(random, kernels, weight, inputs.activations.part(first, count), y.as<float>())) {
    return "rows outside of the strips are written";
  }
  return CompareOutputs(packed, weight, inputs, first, count, weight.rows, nullptr, y.as<float>(), worst);
}

// A damaged matrix is refused, or harmless: the sanitizers see the rest. Returns whether it was refused.
bool RunDamaged(Random& random, const Kernels& kernels, Packed packed) {
  Damage(random, &packed);
  const Laid laid(random, packed);
  Weight weight;
  Message message;
  if (!Check(packed, laid, &weight, &message)) {
    if (message.empty()) std::abort();
    return true;
  }
  const Inputs inputs(random, weight, packed.attributes, kernels);
  const Block y(random, static_cast<size_t>(inputs.rows * weight.rows) * 4, 4);
  MultiplyInRanges(random, kernels, weight, inputs.activations, y.as<float>());
  return false;
}

// Which expert each row of X goes to; some experts have no rows, and sometimes one has all or most of them.
std::vector<int64_t> RandomExperts(Random& random, int64_t rows, int64_t count) {
  std::vector<int64_t> experts(static_cast<size_t>(rows));
  const int64_t favourite = Between(random, 0, count - 1), share = Between(random, 0, 4);
  for (int64_t& expert : experts) expert = Between(random, 0, 3) < share ? favourite : Between(random, 0, count - 1);
  if (Between(random, 0, 3) == 0) std::sort(experts.begin(), experts.end());
  return experts;
}

// Multiplies rows of X by the matrices of experts, which may be damaged; returns what is wrong, or nothing.
std::string CompareExperts(Random& random, const Kernels& kernels, double* worst) {
  const int64_t width = kStripRows * Between(random, 1, 3);
  Packed packed = RandomPacked(random, width * Between(random, 1, 6));
  const bool damaged = Between(random, 0, 3) == 0;
  if (damaged) Damage(random, &packed);
  const Laid laid(random, packed);
  Weight weight;
  Message message;
  if (!Check(packed, laid, &weight, &message) || !CheckExperts(weight, width, &message)) {
    return damaged ? "" : std::string("good experts are refused: ") + message.text();
  }
  const Inputs inputs(random, weight, packed.attributes, kernels);
  const int64_t rows = inputs.rows, columns = weight.columns, count = weight.rows / width;
  std::vector<int64_t> experts = RandomExperts(random, rows, count);
  const bool wrong = Between(random, 0, 7) == 0;
  if (wrong) {
    const int64_t others[] = {-1, count, INT64_MIN, INT64_MAX};
    experts[static_cast<size_t>(Between(random, 0, rows - 1))] = others[Between(random, 0, 3)];
  }
  const Block x(random, static_cast<size_t>(rows * columns) * 4, 4), y(random, static_cast<size_t>(rows * width) * 4, 4);
  for (int64_t row = 0; row < rows; ++row) {
    std::memcpy(x.as<float>() + row * columns, inputs.x.as<float>() + row * inputs.stride,
                static_cast<size_t>(columns) * 4);
  }
  std::fill_n(y.as<float>(), rows * width, kUntouched);
  OneThread thread(random);
  const bool rounded = packed.attributes.activation_bits == 8;
  const bool refused = MultiplyExperts(kernels, {weight, width, x.as<float>(), rows, rounded, experts.data(),
                                                 y.as<float>()}, &thread) != nullptr;
  if (refused != wrong) return wrong ? "an expert that is none is not noticed" : "good numbers of experts are refused";
  if (wrong || damaged) return "";
  return CompareOutputs(packed, weight, inputs, 0, rows, width, experts.data(), y.as<float>(), worst);
}

// A matrix of int8 of which every weight is stored, as it is.
Packed RandomDense(Random& random) {
  Packed packed;
  packed.type = ValueType::kInt8;
  packed.rows = Between(random, 0, 100);
  packed.attributes.columns = Between(random, 1, Between(random, 0, 7) == 0 ? 4000 : 300);
  packed.attributes.activation_bits = Between(random, 0, 1) == 0 ? 32 : 8;
  for (int64_t i = 0; i < packed.rows * packed.attributes.columns; ++i) {
    packed.values.push_back(static_cast<uint8_t>(RandomStored(random, packed.type)));
    packed.dense.push_back(Decoded(packed.type, packed.values.back()));
  }
  packed.scale_rows = packed.rows;
  packed.scales.resize(static_cast<size_t>(packed.rows));
  for (float& scale : packed.scales) scale = 0.01f + std::fabs(Normal(random));
  packed.bias.resize(Between(random, 0, 1) == 0 ? 1 : static_cast<size_t>(packed.rows));
  for (float& bias : packed.bias) bias = Normal(random);
  return packed;
}

// Multiplies by a dense matrix, some of whose shapes or types may be wrong; returns what is wrong with the result.
std::string CompareDense(Random& random, const Kernels& kernels, double* worst) {
  const Packed packed = RandomDense(random);
  const Block values = Copy(random, packed.values, 1), scales = Copy(random, packed.scales, 4);
  const Block bias = Copy(random, packed.bias, 4);
  Tensor tensors[kDenseInputs] = {{ort::kInt8, 2, {packed.rows, packed.attributes.columns}, values.as<void>()},
                                  {ort::kFloat, 1, {packed.rows}, scales.as<void>()},
                                  {ort::kFloat, 1, {static_cast<int64_t>(packed.bias.size())}, bias.as<void>()}};
  const bool damaged = Between(random, 0, 3) == 0;
  if (damaged) {
    Tensor& tensor = tensors[Between(random, 0, kDenseInputs - 1)];
    switch (Between(random, 0, 3)) {
      case 0: tensor.type = ort::kUint8; break;
      case 1: tensor.rank += 1; break;
      case 2: tensor.dims[0] += 2; break;
      default: tensor.dims[tensor.rank - 1] = tensor.rank == 2 ? 0 : packed.rows + 2;
    }
  }
  DenseParts parts;
  Weight weight;
  Message message;
  if (!parts.Make(tensors, packed.attributes.activation_bits, &weight, &message)) {
    return damaged ? "" : std::string("a good dense matrix is refused: ") + message.text();
  }
  if (damaged) return "damage to a dense matrix is not noticed";
  if (packed.rows == 0) return "";
  const Inputs inputs(random, weight, packed.attributes, kernels);
  const int64_t first = inputs.RandomFirst(random), count = inputs.RandomCount(random, first);
  const Block y(random, static_cast<size_t>(count * weight.rows) * 4, 4);
  if (!MultiplyInRanges(random, kernels, weight, inputs.activations.part(first, count), y.as<float>())) {
    return "rows outside of the strips are written";
  }
  return CompareOutputs(packed, weight, inputs, first, count, weight.rows, nullptr, y.as<float>(), worst);
}

const Kernels* Named(const char* name) {
#if defined(BLOCKPRESS_X86) && defined(BLOCKPRESS_EMULATED_AVX512)
  if (std::strcmp(name, kAvx512Kernels.name) == 0) return &kAvx512Kernels;
#endif
#if defined(BLOCKPRESS_EMULATED_NEON)
  if (std::strcmp(name, kNeonKernels.name) == 0) return &kNeonKernels;
#endif
#if defined(_WIN32)
  _putenv_s("BLOCKPRESS_RUNTIME_ISA", name);
#else
  setenv("BLOCKPRESS_RUNTIME_ISA", name, 1);
#endif
  const char* error = "";
  return BestKernels(&error);
}

int Fuzz(const Kernels& kernels, int64_t rounds, uint64_t seed) {
  static constexpr const char* kTypeNames[] = {"float32", "float16", "bfloat16", "int8", "int4"};
  double worst = 0, worst_attention = 0;
  int64_t refused = 0;
  for (int64_t round = 0; round < rounds; ++round) {
    Random random(seed + static_cast<uint64_t>(round));
    const std::string wrong_experts = CompareExperts(random, kernels, &worst);
    if (!wrong_experts.empty()) {
      std::printf("%s: experts: %s: --rounds 1 --seed %llu --isa %s\n", kernels.name, wrong_experts.c_str(),
                  static_cast<unsigned long long>(seed + static_cast<uint64_t>(round)), kernels.name);
      return 1;
    }
    const std::string wrong_dense = CompareDense(random, kernels, &worst);
    if (!wrong_dense.empty()) {
      std::printf("%s: dense: %s: --rounds 1 --seed %llu --isa %s\n", kernels.name, wrong_dense.c_str(),
                  static_cast<unsigned long long>(seed + static_cast<uint64_t>(round)), kernels.name);
      return 1;
    }
    const std::string wrong_attention = CompareAttention(random, kernels, &worst_attention);
    if (!wrong_attention.empty()) {
      std::printf("%s: attention: %s: --rounds 1 --seed %llu --isa %s\n", kernels.name, wrong_attention.c_str(),
                  static_cast<unsigned long long>(seed + static_cast<uint64_t>(round)), kernels.name);
      return 1;
    }
    const Packed packed = RandomPacked(random, 0);
    const std::string wrong = Compare(random, kernels, packed, &worst);
    if (!wrong.empty()) {
      std::printf("%s: %s\n  %s, %lld x %lld, group size %lld, %lld activation bits: --rounds 1 --seed %llu --isa %s\n",
                  kernels.name, wrong.c_str(), kTypeNames[static_cast<int>(packed.type)],
                  static_cast<long long>(packed.rows), static_cast<long long>(packed.attributes.columns),
                  static_cast<long long>(packed.attributes.group_size),
                  static_cast<long long>(packed.attributes.activation_bits),
                  static_cast<unsigned long long>(seed + static_cast<uint64_t>(round)), kernels.name);
      return 1;
    }
    if (RunDamaged(random, kernels, packed)) ++refused;
  }
  std::printf("%s: %lld rounds, largest error %.2g, of attention %.2g, %lld of as many damaged matrices refused\n",
              kernels.name, static_cast<long long>(rounds), worst, worst_attention, static_cast<long long>(refused));
  return 0;
}

int Main(int argc, char** argv) {
  int64_t rounds = 1000;
  uint64_t seed = 1;
  std::string only;
  for (int i = 1; i + 1 < argc; i += 2) {
    const std::string option = argv[i];
    if (option == "--rounds") rounds = std::atoll(argv[i + 1]);
    if (option == "--seed") seed = std::strtoull(argv[i + 1], nullptr, 10);
    if (option == "--isa") only = argv[i + 1];
  }
  int failed = 0;
  for (const char* name : {"scalar", "avx2", "avx2-128", "avx512", "neon"}) {
    if (!only.empty() && only != name) continue;
    const Kernels* kernels = Named(name);
    if (kernels == nullptr) {
      std::printf("%s: cannot run here\n", name);
    } else {
      failed |= Fuzz(*kernels, rounds, seed);
    }
  }
  return failed;
}

} // namespace
} // namespace blockpress

int main(int argc, char** argv) { return blockpress::Main(argc, argv); }
