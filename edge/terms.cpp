#include "terms.h"

#include <algorithm>
#include <utility>

namespace diffpress {

Terms::Terms(const Schedule& table, std::vector<float> first) : table_(table), size_(first.size()) {
  terms_[0] = std::move(first);
  std::size_t number = 1;
  for (const auto& update : table.updates) {
    ++number;
    for (const Operation& own : update) {
      for (const auto& weight : own.weights) last_use_[weight.first] = number;
      ++number;
    }
  }
}

std::vector<float> Terms::next(std::size_t call, TorchNoise& noise) {
  if (table_.updates.empty()) {
    std::vector<std::pair<std::size_t, float>> weights;
    for (const float weight : table_.coefficients[call]) weights.emplace_back(weights.size(), weight);
    return sum(weights);
  }
  std::vector<float> now;
  for (const Operation& own : table_.updates[call]) {
    now = own.draws ? noise.draw(size_) : sum(own.weights);
    for (float& value : now) value = std::min(std::max(value, own.low), own.high);
    terms_[count_] = now;
    for (auto term = terms_.begin(); term != terms_.end();) {
      const auto use = last_use_.find(term->first);
      term = use == last_use_.end() || use->second <= count_ ? terms_.erase(term) : std::next(term);
    }
    ++count_;
  }
  return now;
}

std::vector<float> Terms::sum(const std::vector<std::pair<std::size_t, float>>& weights) const {
  std::vector<double> total(size_);
  for (const auto& [term, weight] : weights) {
    const float* values = terms_.at(term).data();
    for (std::size_t i = 0; i < size_; ++i) total[i] += static_cast<double>(weight) * values[i];
  }
  return {total.begin(), total.end()};
}

}  // namespace diffpress
