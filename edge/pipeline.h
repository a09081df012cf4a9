// From what the user asks for to pixels: conditions, the sampling loop by table, guidance, and the decoder.
#pragma once
#include <optional>
#include <string>
#include <vector>

#include "denoiser.h"
#include "engine.h"
#include "manifest.h"
#include "tokenizer.h"

namespace diffpress {

// Pixels [height, width, channels] in 0..1.
struct Image {
  std::int64_t height, width, channels;
  std::vector<float> pixels;
};

struct Wanted {
  std::string condition;
  std::uint64_t seed = 0;
  std::optional<std::size_t> steps;
  std::optional<double> guidance_scale;
};

class Pipeline {
 public:
  // `folder` holds the graphs. Where nothing is held, a graph is closed before the next part's is opened, which keeps memory low.
  Pipeline(const Engine& engine, const Export& manifest, std::string folder, const Tokenizer* tokenizer, bool holds);

  // Throws UserError, before any graph runs, for what this export has not.
  Image generate(const Wanted& wanted);
  // Seconds that the denoiser took in the latest run.
  double denoiser_seconds() const { return denoiser_seconds_; }

 private:
  Session open(const std::string& graph) const;
  const Schedule& schedule(std::size_t steps) const;
  double guidance(const std::optional<double>& asked) const;
  Tensors conditions(const std::string& condition, bool guided);
  Tensor tokens(const std::string& condition, bool guided) const;
  Tensor label(const std::string& condition, bool guided) const;
  std::vector<float> sample(const Wanted& wanted, std::size_t steps, const Tensors& inputs, double guidance);
  std::vector<float> answer(const std::vector<float>& sample, const Schedule& table, std::size_t call, const Tensors& inputs, double guidance);
  Image decode(std::vector<float> sample);

  const Engine& engine_;
  const Export& manifest_;
  std::string folder_;
  const Tokenizer* tokenizer_;
  bool holds_;
  double denoiser_seconds_ = 0;
  std::optional<Session> encoder_, decoder_;
  std::optional<Denoiser> denoiser_;
};

}  // namespace diffpress
