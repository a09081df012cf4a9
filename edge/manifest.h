// What `bundle.json` and `export.json` say, checked when it is read.
#pragma once
#include <array>
#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace diffpress {

enum class Type { float32, int8, int64 };

struct Port {
  std::string name;
  Type type;
  // -1 stands for the batch.
  std::vector<std::int64_t> shape;
};

struct Graph {
  std::string file;
  std::vector<Port> inputs, outputs;
};

struct Labels {
  std::int64_t count, null;
  std::map<std::string, std::int64_t> names;
};

// What a scheduler computes once: noise, or a weighted sum of what there is, which may be clipped.
struct Operation {
  bool draws;
  std::vector<std::pair<std::size_t, float>> weights;
  float low, high;
};

// A whole sampling run of a scheduler, as numbers: either coefficients hold it or updates, whose terms are numbered as they
// appear: 0 is the first sample; each call adds its output, then each operation of its update what it gives.
struct Schedule {
  float init_noise_sigma;
  std::vector<float> timesteps, input_scale;
  std::vector<std::vector<float>> coefficients;
  std::vector<std::vector<Operation>> updates;
};

// A tensor that graphs of the denoiser give, of which the latest `count` are kept for later calls.
struct Kept {
  std::string name;
  std::size_t count;
};

struct PlannedCall {
  std::string graph;
  // [units, kept]; empty where all is computed.
  std::vector<std::vector<float>> forecast;
  std::int64_t correction;
};

struct StepPlan {
  std::vector<Kept> kept;
  std::map<std::size_t, std::vector<PlannedCall>> calls;
};

struct SelfTest {
  std::string condition, image;
  std::uint64_t seed;
  std::size_t steps;
  std::optional<double> guidance_scale;
  double tolerance;
};

struct Export {
  std::map<std::string, Graph> components;
  std::array<std::int64_t, 3> latent_shape;
  float scaling_factor;
  bool takes_prompt;
  std::optional<Labels> labels;
  // Whether the half of a guided batch that has the condition comes first; none where there is no guidance.
  std::optional<bool> conditional_first;
  std::size_t steps;
  std::optional<double> guidance_scale;
  std::map<std::size_t, Schedule> schedules;
  std::optional<StepPlan> step_plan;
  SelfTest self_test;
};

struct File {
  std::uint64_t size;
  std::string sha256;
};

struct Bundle {
  std::string target, folder, library;
  std::optional<std::string> tokenizer;
  std::optional<std::uint64_t> peak_memory_bytes;
  std::map<std::string, File> files;
};

// Both throw UserError for what is damaged, newer than this runner, or out of all bounds.
Bundle parse_bundle(const std::string& text);
Export parse_export(const std::string& text);

}  // namespace diffpress
