#include "denoiser.h"

#include <algorithm>

#include "errors.h"

namespace diffpress {

void Denoiser::begin(std::size_t steps) {
  steps_ = steps, call_ = 0;
  past_.clear();
  session("denoiser");
}

Tensor Denoiser::answer(const Tensors& inputs) {
  std::string graph = "denoiser";
  Tensors known = inputs;
  if (manifest_.step_plan) {
    const PlannedCall& call = manifest_.step_plan->calls.at(steps_).at(call_++);
    graph = call.graph;
    known.merge(planned(call));
  }
  Tensors outputs = session(graph).run(known);
  for (const Kept& kept : manifest_.step_plan ? manifest_.step_plan->kept : std::vector<Kept>{}) {
    const auto given = outputs.find(kept.name);
    if (given == outputs.end()) continue;
    auto& own = past_[kept.name];
    own.push_front(given->second);
    own.resize(std::min(own.size(), kept.count));
    outputs.erase(given);
  }
  if (outputs.size() != 1 || outputs.begin()->second.type() != ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT)
    throw UserError(graph + " gives not one output in float32. Export and package it again.");
  return outputs.begin()->second;
}

// Where fewer of a tensor have been given yet, the oldest stands for those before.
Tensors Denoiser::planned(const PlannedCall& call) const {
  Tensors found;
  for (const Kept& kept : manifest_.step_plan->kept) {
    const auto own = past_.find(kept.name);
    for (std::size_t place = 0; own != past_.end() && place < kept.count; ++place)
      found[kept.name + ".past" + std::to_string(place + 1)] = own->second[std::min(place, own->second.size() - 1)];
  }
  if (!call.forecast.empty()) {
    const auto rows = static_cast<std::int64_t>(call.forecast.size()), columns = static_cast<std::int64_t>(call.forecast[0].size());
    Tensor forecast = engine_.tensor<float>({rows, columns});
    float* to = forecast.data<float>();
    for (const auto& row : call.forecast) to = std::copy(row.begin(), row.end(), to);
    found["forecast"] = forecast;
  }
  Tensor correction = engine_.tensor<std::int64_t>({});
  *correction.data<std::int64_t>() = call.correction;
  found["correction"] = correction;
  return found;
}

const Session& Denoiser::session(const std::string& graph) {
  auto own = sessions_.find(graph);
  if (own == sessions_.end()) own = sessions_.emplace(graph, open_(graph)).first;
  return own->second;
}

}  // namespace diffpress
