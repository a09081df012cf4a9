#include "pipeline.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>

#include "errors.h"
#include "files.h"
#include "noise.h"
#include "terms.h"

namespace diffpress {

namespace {

double seconds() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

const Tensor& only(const Tensors& outputs, const std::string& graph) {
  if (outputs.size() != 1 || outputs.begin()->second.type() != ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT)
    throw UserError(graph + " gives not one output in float32. Export and package it again.");
  return outputs.begin()->second;
}

}  // namespace

Pipeline::Pipeline(const Engine& engine, const Export& manifest, std::string folder, const Tokenizer* tokenizer, bool holds)
    : engine_(engine), manifest_(manifest), folder_(std::move(folder)), tokenizer_(tokenizer), holds_(holds) {}

Image Pipeline::generate(const Wanted& wanted) {
  const std::size_t steps = wanted.steps.value_or(manifest_.steps);
  schedule(steps);
  const double scale = guidance(wanted.guidance_scale);
  const Tensors inputs = conditions(wanted.condition, scale > 1);
  return decode(sample(wanted, steps, inputs, scale));
}

Session Pipeline::open(const std::string& graph) const {
  const Graph& own = manifest_.components.at(graph);
  return Session(engine_, inside(folder_, own.file), own);
}

const Schedule& Pipeline::schedule(std::size_t steps) const {
  const auto found = manifest_.schedules.find(steps);
  if (found != manifest_.schedules.end()) return found->second;
  std::string have;
  for (const auto& known : manifest_.schedules) have += (have.empty() ? "" : ", ") + std::to_string(known.first);
  throw UserError("this bundle has no schedule of " + std::to_string(steps) + " steps. Use one of " + have + ".");
}

double Pipeline::guidance(const std::optional<double>& asked) const {
  if (!manifest_.conditional_first) {
    if (asked && !manifest_.guidance_scale) throw UserError("this pipeline has no guidance. Leave --guidance out.");
    if (asked && *asked != *manifest_.guidance_scale)
      throw UserError("this pipeline was exported for a guidance scale of " + std::to_string(*manifest_.guidance_scale) + ". Leave --guidance out.");
    return 1;
  }
  return asked ? *asked : manifest_.guidance_scale.value_or(1);
}

Tensors Pipeline::conditions(const std::string& condition, bool guided) {
  if (manifest_.takes_prompt) {
    const Tensor ids = tokens(condition, guided);
    if (!encoder_) encoder_.emplace(open("text_encoder"));
    const Tensors found = encoder_->run({{"input_ids", ids}});
    if (!holds_) encoder_.reset();
    return found;
  }
  if (manifest_.labels) return {{"class_labels", label(condition, guided)}};
  if (!condition.empty()) throw UserError("this pipeline takes neither prompt nor label. Leave it out.");
  return {};
}

// Both halves of a guided batch go through the encoder at once.
Tensor Pipeline::tokens(const std::string& condition, bool guided) const {
  const Tokenizer::Tokens own = tokenizer_->encode(condition), none = tokenizer_->encode("");
  if (own.cut > 0)
    std::fprintf(stderr, "the prompt is too long: its last %zu tokens were cut\n", own.cut);
  const auto length = static_cast<std::int64_t>(own.ids.size());
  const Tensor ids = engine_.tensor<std::int64_t>({guided ? 2 : 1, length});
  const bool first = !guided || *manifest_.conditional_first;
  auto* to = std::copy_n((first ? own : none).ids.begin(), length, ids.data<std::int64_t>());
  if (guided) std::copy_n((first ? none : own).ids.begin(), length, to);
  return ids;
}

Tensor Pipeline::label(const std::string& condition, bool guided) const {
  const Labels& labels = *manifest_.labels;
  const bool decimal = !condition.empty() && condition.size() < 10 && condition.find_first_not_of("0123456789") == std::string::npos;
  const auto named = labels.names.find(condition);
  const std::int64_t number = decimal ? std::stoll(condition) : named == labels.names.end() ? -1 : named->second;
  if (number < 0 || number >= labels.count)
    throw UserError("\"" + condition + "\" is no class of this pipeline. Give a number below " + std::to_string(labels.count) + ".");
  const Tensor found = engine_.tensor<std::int64_t>({guided ? 2 : 1});
  auto* to = found.data<std::int64_t>();
  if (guided) to[*manifest_.conditional_first ? 1 : 0] = labels.null;
  to[guided && !*manifest_.conditional_first ? 1 : 0] = number;
  return found;
}

std::vector<float> Pipeline::sample(const Wanted& wanted, std::size_t steps, const Tensors& inputs, double guidance) {
  const Schedule& table = schedule(steps);
  const auto [channels, height, width] = manifest_.latent_shape;
  if (!denoiser_) denoiser_.emplace(engine_, manifest_, [this](const std::string& graph) { return open(graph); });
  denoiser_->begin(steps);
  denoiser_seconds_ = 0;
  TorchNoise noise(wanted.seed);
  std::vector<float> now = noise.draw(static_cast<std::size_t>(channels * height * width));
  for (float& value : now) value *= table.init_noise_sigma;
  Terms terms(table, now);
  for (std::size_t call = 0; call < table.timesteps.size(); ++call) {
    terms.add(answer(now, table, call, inputs, guidance));
    now = terms.next(call, noise);
  }
  if (!holds_) denoiser_.reset();
  return now;
}

// The guided output of one call.
std::vector<float> Pipeline::answer(const std::vector<float>& sample, const Schedule& table, std::size_t call, const Tensors& inputs,
                                    double guidance) {
  const auto [channels, height, width] = manifest_.latent_shape;
  const std::size_t size = sample.size();
  const bool guided = guidance > 1;
  Tensors given = inputs;
  const Tensor scaled = engine_.tensor<float>({guided ? 2 : 1, channels, height, width}), timestep = engine_.tensor<float>({1});
  for (std::size_t i = 0; i < size; ++i) scaled.data<float>()[i] = sample[i] * table.input_scale[call];
  if (guided) std::copy_n(scaled.data<float>(), size, scaled.data<float>() + size);
  *timestep.data<float>() = table.timesteps[call];
  given["sample"] = scaled, given["timestep"] = timestep;
  const double start = seconds();
  const Tensor output = denoiser_->answer(given);
  denoiser_seconds_ += seconds() - start;
  if (output.count() != (guided ? 2 * size : size))
    throw UserError("the denoiser gives not one number for each of its sample. Export and package it again.");
  std::vector<float> found(output.data<float>(), output.data<float>() + size);
  const float* second = output.data<float>() + size;
  for (std::size_t i = 0; guided && i < size; ++i) {
    const float first = found[i], conditional = *manifest_.conditional_first ? first : second[i];
    const float null = *manifest_.conditional_first ? second[i] : first;
    found[i] = null + static_cast<float>(guidance) * (conditional - null);
  }
  return found;
}

Image Pipeline::decode(std::vector<float> sample) {
  auto [channels, height, width] = manifest_.latent_shape;
  if (manifest_.components.count("decoder")) {
    const Tensor latents = engine_.tensor<float>({1, channels, height, width});
    for (std::size_t i = 0; i < sample.size(); ++i) latents.data<float>()[i] = sample[i] / manifest_.scaling_factor;
    if (!decoder_) decoder_.emplace(open("decoder"));
    const Tensor made = only(decoder_->run({{"latents", latents}}), "decoder");
    if (!holds_) decoder_.reset();
    const auto shape = made.shape();
    if (shape.size() != 4 || shape[0] != 1) throw UserError("the decoder gives no image. Export and package it again.");
    channels = shape[1], height = shape[2], width = shape[3];
    sample.assign(made.data<float>(), made.data<float>() + made.count());
  }
  Image image{height, width, channels, std::vector<float>(sample.size())};
  const std::int64_t area = height * width;
  for (std::int64_t place = 0; place < area; ++place)
    for (std::int64_t channel = 0; channel < channels; ++channel)
      // Written so that NaN becomes 0.
      image.pixels[place * channels + channel] = std::min(std::max(0.0f, sample[channel * area + place] / 2 + 0.5f), 1.0f);
  return image;
}

}  // namespace diffpress
