// What schedulers compute of samples, outputs of the denoiser and noise.
#pragma once
#include <map>
#include <vector>

#include "manifest.h"
#include "noise.h"

namespace diffpress {

// The terms of one sampling run, by their numbers; kept as long as a later operation takes them up.
class Terms {
 public:
  Terms(const Schedule& table, std::vector<float> first);

  void add(std::vector<float> output) { terms_[count_++] = std::move(output); }
  // The sample that the next call is given.
  std::vector<float> next(std::size_t call, TorchNoise& noise);

 private:
  std::vector<float> sum(const std::vector<std::pair<std::size_t, float>>& weights) const;

  const Schedule& table_;
  std::size_t size_, count_ = 1;
  std::map<std::size_t, std::vector<float>> terms_;
  // The last operation that takes a term up, by the number of the term that it gives.
  std::map<std::size_t, std::size_t> last_use_;
};

}  // namespace diffpress
