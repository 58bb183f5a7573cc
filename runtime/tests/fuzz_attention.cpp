#include "fuzz_attention.h"

#include <cmath>
#include <cstring>
#include <limits>

#include "attention.h"
#include "checks.h"

namespace blockpress {
namespace {

constexpr float kLowestMask = std::numeric_limits<float>::lowest();

// The inputs in memory of their own, and their shapes.
struct Case {
  int64_t batches, tokens, past, room, key_heads, heads, key_width, value_width, rotary_width;
  float scale;
  bool rotates;
  std::vector<std::shared_ptr<Block>> blocks;
  Tensor inputs[kAttentionInputs];

  int64_t keys() const { return past + tokens; }
  const float* at(AttentionInput which) const { return static_cast<const float*>(inputs[which].data); }

  void Add(Random& random, std::initializer_list<int64_t> dims) {
    const auto which = blocks.size();
    Tensor& tensor = inputs[which];
    tensor = {ort::kFloat, static_cast<int64_t>(dims.size()), {}, nullptr};
    std::copy(dims.begin(), dims.end(), tensor.dims);
    int64_t count = 1;
    for (int64_t size : dims) count *= size;
    blocks.push_back(std::make_shared<Block>(random, static_cast<size_t>(count) * 4, 4));
    float* data = blocks.back()->as<float>();
    for (int64_t i = 0; i < count; ++i) data[i] = Normal(random);
    tensor.data = data;
  }
};

int64_t RandomTokens(Random& random) {
  const int64_t choice = Between(random, 0, 5);
  return choice < 2 ? 1 : choice < 4 ? Between(random, 2, 9) : choice == 4 ? Between(random, 10, 90) : 0;
}

// Hides keys as causal masks, windows and padding do, and adds numbers to others.
void FillMask(Random& random, const Case& of, Tensor* mask) {
  float* row = static_cast<float*>(const_cast<void*>(mask->data));
  const int64_t rows = mask->dims[0] * mask->dims[1] * mask->dims[2], keys = of.keys();
  const int64_t kind = Between(random, 0, 5), window = Between(random, 1, 200);
  for (int64_t i = 0; i < rows; ++i, row += keys) {
    const int64_t last = mask->dims[2] == 1 ? keys - 1 : of.past + i % of.tokens;
    const int64_t padding = Between(random, 0, 3) == 0 ? Between(random, 0, keys) : 0; // sometimes all that is seen
    for (int64_t key = 0; key < keys; ++key) {
      const bool hidden = key > last || key < padding || (kind == 1 && key <= last - window);
      row[key] = hidden ? kind == 2 ? -INFINITY : kLowestMask : kind == 3 ? row[key] : 0.0f;
    }
    if (kind == 2 && padding > last) row[last] = 0; // or all would be minus infinity, and the softmax NaN
  }
}

// Of random sizes.
Case RandomSizes(Random& random) {
  Case of{};
  of.batches = Between(random, 1, 2);
  of.tokens = RandomTokens(random);
  const int64_t past = Between(random, 0, 5);
  of.past = past < 2 ? 0 : past == 2 ? Between(random, 900, 1300) : Between(random, 1, 200);
  // The past has places for itself alone, or for the new tokens too, and sometimes for more.
  const int64_t room = Between(random, 0, 3);
  of.room = room < 2 ? of.past : of.keys() + (room == 2 ? 0 : Between(random, 1, 100));
  of.key_heads = Between(random, 1, 3);
  of.heads = of.key_heads * (Between(random, 0, 1) == 0 ? 1 : Between(random, 2, 20));
  of.key_width = Between(random, 0, 1) == 0 ? 16 * Between(random, 1, 6) : Between(random, 1, 90);
  of.value_width = Between(random, 0, 1) == 0 ? of.key_width : Between(random, 1, 90);
  of.rotary_width = Between(random, 0, 1) == 0 ? of.key_width / 2 * 2 : 2 * Between(random, 0, of.key_width / 2);
  return of;
}

Case RandomCase(Random& random) {
  const int64_t most = Between(random, 0, 15) == 0 ? 1 << 21 : 1 << 18; // products: the emulations are slow
  Case of = RandomSizes(random);
  while (of.batches * of.heads * of.tokens * of.keys() * (of.key_width + of.value_width) > most) of = RandomSizes(random);
  of.rotates = Between(random, 0, 2) != 0;
  of.scale = 0.02f + 0.2f * std::fabs(Normal(random));
  const auto add = [&](int64_t heads, int64_t width) {
    if (Between(random, 0, 1) == 0) of.Add(random, {of.batches, of.tokens, heads, width});
    else of.Add(random, {of.batches, of.tokens, heads * width});
  };
  add(of.heads, of.key_width);
  add(of.key_heads, of.key_width);
  add(of.key_heads, of.value_width);
  for (int64_t width : {of.key_width, of.value_width}) {
    if (of.room == 0) of.Add(random, {1, Between(random, 1, 3), 0, Between(random, 0, 9)});
    else of.Add(random, {of.batches, of.key_heads, of.room, width});
  }
  const auto or_one = [&](int64_t size) { return Between(random, 0, 1) == 0 ? size : 1; };
  of.Add(random, {or_one(of.batches), or_one(of.heads), or_one(of.tokens), of.keys()});
  if (of.tokens != 0) FillMask(random, of, &of.inputs[kAttentionMask]);
  const int64_t tables = or_one(of.batches);
  for (int i = 0; i < 2; ++i) of.Add(random, {tables, 1, of.tokens, of.rotary_width});
  return of;
}

// One that a reader must notice, or that leads nowhere.
void DamageCase(Random& random, Case* of) {
  Tensor& tensor = of->inputs[Between(random, 0, of->rotates ? kSin : kAttentionMask)];
  const int64_t axis = Between(random, 0, tensor.rank - 1);
  switch (Between(random, 0, 3)) {
    case 0: tensor.type = ort::kFloat16; break;
    case 1: tensor.rank += Between(random, 0, 1) == 0 ? 1 : -1; break;
    case 2: tensor.dims[axis] = std::max<int64_t>(0, tensor.dims[axis] - 1); break;
    default: of->key_heads = Between(random, -1, of->key_heads); break;
  }
}

// Column `column` of a key or query, turned; `terms` gets the sum of the sizes of what makes it.
double Rotated(const Case& of, const float* x, int64_t batch, int64_t token, int64_t column, double* terms) {
  const int64_t width = of.rotates ? of.rotary_width : 0;
  if (column >= width) {
    *terms = std::fabs(static_cast<double>(x[column]));
    return static_cast<double>(x[column]);
  }
  const int64_t angle = ((of.inputs[kCos].dims[0] == 1 ? 0 : batch) * of.tokens + token) * width + column;
  const double kept = static_cast<double>(x[column]) * static_cast<double>(of.at(kCos)[angle]);
  const double swapped =
      static_cast<double>(x[(column + width / 2) % width]) * static_cast<double>(of.at(kSin)[angle]);
  *terms = std::fabs(kept) + std::fabs(swapped);
  return kept + swapped;
}

struct Exact {
  std::vector<double> y, y_terms, keys, key_terms, values;
};

// The cache of one head as it must be: (T, width).
void ExactCache(const Case& of, int64_t batch, int64_t head, Exact* exact) {
  for (int64_t key = 0; key < of.keys(); ++key) {
    const bool is_new = key >= of.past;
    const int64_t past = ((batch * of.key_heads + head) * of.room + key), token = key - of.past;
    const int64_t fresh = (batch * of.tokens + token) * of.key_heads + head;
    for (int64_t column = 0; column < of.key_width; ++column) {
      double terms = 0;
      const double value = !is_new
                               ? static_cast<double>(of.at(kPastKey)[past * of.key_width + column])
                               : Rotated(of, of.at(kKey) + fresh * of.key_width, batch, token, column, &terms);
      exact->keys.push_back(value);
      exact->key_terms.push_back(terms);
    }
    for (int64_t column = 0; column < of.value_width; ++column) {
      exact->values.push_back(static_cast<double>(!is_new ? of.at(kPastValue)[past * of.value_width + column]
                                                              : of.at(kValue)[fresh * of.value_width + column]));
    }
  }
}

// The output of one token and query head, and how large an error of float may make it.
void ExactOutput(const Case& of, int64_t batch, int64_t token, int64_t head, Exact* exact) {
  const Tensor& mask = of.inputs[kAttentionMask];
  const auto index = [&](int axis, int64_t i) { return mask.dims[axis] == 1 ? 0 : i; };
  const int64_t row = (index(0, batch) * mask.dims[1] + index(1, head)) * mask.dims[2] + index(2, token);
  const float* q = of.at(kQuery) + ((batch * of.tokens + token) * of.heads + head) * of.key_width;
  std::vector<double> scores;
  double largest = -INFINITY, worst_terms = 0, total = 0;
  for (int64_t key = 0; key < of.keys(); ++key) {
    double score = 0, terms = 0;
    for (int64_t column = 0; column < of.key_width; ++column) {
      double query_terms = 0;
      const double query = Rotated(of, q, batch, token, column, &query_terms);
      const auto at = static_cast<size_t>(key * of.key_width + column);
      score += query * exact->keys[at];
      terms += query_terms * std::max(std::fabs(exact->keys[at]), exact->key_terms[at]);
    }
    const float added = of.at(kAttentionMask)[row * of.keys() + key];
    score = score * static_cast<double>(of.scale) + static_cast<double>(added);
    if (added == kLowestMask) score = static_cast<double>(added); // what float makes of it
    worst_terms = std::max(worst_terms, terms * static_cast<double>(of.scale));
    scores.push_back(score);
    largest = std::max(largest, score);
  }
  for (double& score : scores) total += score = std::exp(score - largest);
  for (int64_t column = 0; column < of.value_width; ++column) {
    double y = 0, terms = 0;
    for (int64_t key = 0; key < of.keys(); ++key) {
      const double term = scores[static_cast<size_t>(key)] / total *
                          exact->values[static_cast<size_t>(key * of.value_width + column)];
      y += term;
      terms += std::fabs(term);
    }
    exact->y.push_back(y);
    exact->y_terms.push_back(terms * (1 + worst_terms)); // an error of a score is a relative one of its exponential
  }
}

// Whether a number is right; `terms` says how large an error may be.
bool IsRight(float got, double wanted, double terms, double* worst) {
  const double error = std::fabs(static_cast<double>(got) - wanted) / (terms + 1e-30);
  if (!(error <= kTolerance)) return false;
  *worst = std::max(*worst, error);
  return true;
}

std::string CompareHead(const Case& of, const Attention& got, int64_t batch, int64_t head, double* worst) {
  Exact exact;
  ExactCache(of, batch, head, &exact);
  const int64_t group = of.heads / of.key_heads, room = std::max(of.room, of.keys());
  const int64_t first = (batch * of.key_heads + head) * room;
  for (size_t i = 0; i < exact.keys.size(); ++i) {
    const float key = got.present_key[static_cast<size_t>(first * of.key_width) + i];
    if (!IsRight(key, exact.keys[i], exact.key_terms[i], worst)) return "a key of the cache is wrong";
  }
  for (size_t i = 0; i < exact.values.size(); ++i) {
    const float value = got.present_value[static_cast<size_t>(first * of.value_width) + i];
    if (static_cast<double>(value) != exact.values[i]) return "a value of the cache is wrong";
  }
  for (int64_t key = of.keys(); key < of.room; ++key) { // the room behind the tokens is as it was
    const float* wanted = of.at(kPastKey) + (first + key) * of.key_width;
    if (!std::equal(wanted, wanted + of.key_width, got.present_key + (first + key) * of.key_width)) {
      return "the room behind the keys is not what it was";
    }
    wanted = of.at(kPastValue) + (first + key) * of.value_width;
    if (!std::equal(wanted, wanted + of.value_width, got.present_value + (first + key) * of.value_width)) {
      return "the room behind the values is not what it was";
    }
  }
  for (int64_t token = 0; token < of.tokens; ++token) {
    for (int64_t query = head * group; query < (head + 1) * group; ++query) {
      exact.y.clear();
      exact.y_terms.clear();
      ExactOutput(of, batch, token, query, &exact);
      const float* y = got.y + ((batch * of.tokens + token) * of.heads + query) * of.value_width;
      for (size_t column = 0; column < exact.y.size(); ++column) {
        if (IsRight(y[column], exact.y[column], exact.y_terms[column], worst)) continue;
        return "column " + std::to_string(column) + " of head " + std::to_string(query) + " of token " +
               std::to_string(token) + " is " + std::to_string(y[column]) + ", not " + std::to_string(exact.y[column]);
      }
    }
  }
  return "";
}

} // namespace

std::string CompareAttention(Random& random, const Kernels& kernels, double* worst) {
  const Case of = RandomCase(random);
  const bool damaged = Between(random, 0, 3) == 0;
  Case described = of;
  if (damaged) DamageCase(random, &described);
  Attention attention{};
  attention.heads = of.heads;
  attention.key_heads = described.key_heads;
  attention.scale = of.scale;
  Message message;
  if (!CheckAttention(described.inputs, of.rotates, &attention, &message)) {
    if (message.empty()) return "refused without a word";
    return damaged ? "" : std::string("good inputs are refused: ") + message.text();
  }
  const auto floats = [&](int64_t count) { return Block(random, static_cast<size_t>(count) * 4, 4); };
  const int64_t cached = attention.batches * attention.key_heads * attention.present_room();
  const Block y = floats(attention.batches * attention.tokens * attention.heads * attention.value_width);
  const Block keys = floats(cached * attention.key_width), values = floats(cached * attention.value_width);
  attention.y = y.as<float>();
  attention.present_key = keys.as<float>();
  attention.present_value = values.as<float>();
  if (attention.has_room()) { // in the memory of the past
    const auto in_place = [&](AttentionInput which, const Block& memory, int64_t width) {
      std::memcpy(memory.as<float>(), of.at(which), static_cast<size_t>(cached * width) * 4);
      return memory.as<float>();
    };
    attention.past_key = in_place(kPastKey, keys, attention.key_width);
    attention.past_value = in_place(kPastValue, values, attention.value_width);
  }
  OneThread thread(random);
  if (Attend(kernels, attention, &thread) != nullptr) return "good inputs give an error";
  for (int64_t batch = 0; !damaged && batch < of.batches; ++batch) {
    for (int64_t head = 0; head < of.key_heads; ++head) {
      const std::string wrong = CompareHead(of, attention, batch, head, worst);
      if (!wrong.empty()) return wrong;
    }
  }
  return "";
}

} // namespace blockpress
