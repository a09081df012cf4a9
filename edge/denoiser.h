// The denoiser of an export: one graph, or with a step plan one a pattern of rows and what is kept between calls.
#pragma once
#include <deque>
#include <functional>
#include <map>
#include <string>

#include "engine.h"

namespace diffpress {

class Denoiser {
 public:
  using Open = std::function<Session(const std::string& graph)>;

  // Opens graphs as they are needed.
  Denoiser(const Engine& engine, const Export& manifest, Open open)
      : engine_(engine), manifest_(manifest), open_(std::move(open)) {}

  // A run in so many steps begins.
  void begin(std::size_t steps);
  // The output of the run's next call.
  Tensor answer(const Tensors& inputs);

 private:
  Tensors planned(const PlannedCall& call) const;
  const Session& session(const std::string& graph);

  const Engine& engine_;
  const Export& manifest_;
  Open open_;
  std::map<std::string, Session> sessions_;
  std::size_t steps_ = 0, call_ = 0;
  // Of every kept tensor, the latest first.
  std::map<std::string, std::deque<Tensor>> past_;
};

}  // namespace diffpress
