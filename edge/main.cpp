// The runner of a bundle: reads what lies beside it, checks it, and makes an image.
#include <unistd.h>

#include <chrono>
#include <cmath>
#include <cstdio>
#include <ctime>
#include <exception>

#include "engine.h"
#include "errors.h"
#include "files.h"
#include "image_files.h"
#include "manifest.h"
#include "memory.h"
#include "options.h"
#include "pipeline.h"
#include "tokenizer.h"

namespace diffpress {

namespace {

constexpr std::size_t kLongestManifest = 256u << 20, kLongestImage = 1u << 30;
constexpr int kTimed = 5;
// Before the number that `diffpress package` reads.
constexpr const char* kPeak = "peak memory in bytes: ";
using Clock = std::chrono::steady_clock;

double milliseconds_since(Clock::time_point start) { return std::chrono::duration<double, std::milli>(Clock::now() - start).count(); }

// The folder that this program lies in.
std::string own_folder(const std::string& called) {
  char found[4096];
  const ssize_t length = readlink("/proc/self/exe", found, sizeof found);
  const std::string path = length > 0 && length < static_cast<ssize_t>(sizeof found) ? std::string(found, static_cast<std::size_t>(length)) : called;
  const std::size_t slash = path.rfind('/');
  return slash == std::string::npos ? "." : path.substr(0, slash == 0 ? 1 : slash);
}

void check_files(const std::string& folder, const Bundle& bundle, const Export& manifest, const std::string& own) {
  const auto listed = [&](const std::string& name) {
    if (!bundle.files.count(name)) throw UserError("bundle.json lists no digest of " + name + ". Package the export again.");
  };
  for (const auto& [name, graph] : manifest.components) listed(own + graph.file);
  listed(own + manifest.self_test.image);
  listed(own + "export.json");
  if (bundle.tokenizer) listed(*bundle.tokenizer);
  for (const auto& [name, file] : bundle.files) check_file(folder, name, file.size, file.sha256);
}

void check_memory(const Bundle& bundle) {
  const std::uint64_t free = free_memory_bytes();
  if (!bundle.peak_memory_bytes || *bundle.peak_memory_bytes <= free) return;
  throw UserError("this bundle needs " + std::to_string(*bundle.peak_memory_bytes >> 20) + " MiB of memory, and " +
                  std::to_string(free >> 20) + " MiB are free here. Close other programs, or use a smaller model.");
}

// What the user gave, as the pipeline's condition.
std::string condition_of(const Options& options, const Export& manifest) {
  if (options.prompt && !manifest.takes_prompt)
    throw UserError(std::string("this pipeline does not draw prompts: ") + (manifest.labels ? "give --label CLASS." : "leave --prompt out."));
  if (options.label && !manifest.labels)
    throw UserError(std::string("this pipeline does not draw classes: ") + (manifest.takes_prompt ? "give --prompt TEXT." : "leave --label out."));
  if (manifest.labels && !options.label) throw UserError("this pipeline draws classes: give --label CLASS.");
  return options.label ? *options.label : options.prompt.value_or("");
}

void self_test(Pipeline& pipeline, const Export& manifest, const std::string& folder, const Options& options) {
  const SelfTest& test = manifest.self_test;
  const Image expected = parse_npy(read_file(inside(folder, test.image), kLongestImage));
  const Image image = pipeline.generate({test.condition, test.seed, test.steps, test.guidance_scale});
  if (image.height != expected.height || image.width != expected.width || image.channels != expected.channels)
    throw UserError("the self test gives an image of another size. Export and package it again.");
  double squares = 0;
  for (std::size_t i = 0; i < image.pixels.size(); ++i) squares += std::pow(double{image.pixels[i]} - expected.pixels[i], 2);
  const double error = std::sqrt(squares / static_cast<double>(image.pixels.size()));
  if (options.out) write_file(*options.out, png_of(image));
  char words[160];
  // Written so that NaN fails too.
  if (!(error <= test.tolerance)) {
    std::snprintf(words, sizeof words, "the self test differs from torch's image by %.2g (root mean square), allowed is %.2g.", error, test.tolerance);
    throw UserError(std::string(words) + " Use another version of onnxruntime, or another machine.");
  }
  std::printf("the self test gives its image: %.2g from torch's (root mean square), allowed is %.2g\n", error, test.tolerance);
  std::printf("%s%llu\n", kPeak, static_cast<unsigned long long>(peak_memory_bytes()));
}

void bench(Pipeline& pipeline, const Wanted& wanted, const Engine& engine, std::size_t steps, double start_ms, double start_processor_ms) {
  const auto begun = Clock::now();
  pipeline.generate(wanted);
  const double first_ms = milliseconds_since(begun);
  double best_ms = INFINITY, best_denoiser_ms = INFINITY;
  for (int i = 0; i < kTimed; ++i) {
    const auto start = Clock::now();
    pipeline.generate(wanted);
    best_ms = std::min(best_ms, milliseconds_since(start));
    best_denoiser_ms = std::min(best_denoiser_ms, 1e3 * pipeline.denoiser_seconds());
  }
  std::printf("{\"onnxruntime\": \"%s\", \"steps\": %zu, \"start_ms\": %.3f, \"start_processor_ms\": %.3f, \"first_image_ms\": %.3f, \"image_ms\": %.3f, "
              "\"denoiser_ms\": %.3f, \"peak_memory_bytes\": %llu}\n",
              engine.version().c_str(), steps, start_ms, start_processor_ms, first_ms, best_ms, best_denoiser_ms / static_cast<double>(steps),
              static_cast<unsigned long long>(peak_memory_bytes()));
}

int run(int count, char** arguments) {
  const auto begun = Clock::now();
  const Options options = parse_options(count, arguments);
  if (options.help) {
    std::fputs(kHelp, stdout);
    return 0;
  }
  const std::string folder = own_folder(arguments[0]);
  const Bundle bundle = parse_bundle(read_file(folder + "/bundle.json", kLongestManifest));
  const std::string graphs = inside(folder, bundle.folder);
  const Export manifest = parse_export(read_file(graphs + "/export.json", kLongestManifest));
  Wanted wanted = options.wanted;
  if (!options.self_test) wanted.condition = condition_of(options, manifest);
  check_files(folder, bundle, manifest, bundle.folder + "/");
  check_memory(bundle);
  if (manifest.takes_prompt && !bundle.tokenizer) throw UserError("bundle.json names no tokenizer. Package the export again.");
  std::optional<Tokenizer> tokenizer;
  if (bundle.tokenizer) tokenizer.emplace(read_file(inside(folder, *bundle.tokenizer), kLongestManifest));
  const Engine engine(inside(folder, bundle.library), options.threads);
  Pipeline pipeline(engine, manifest, graphs, tokenizer ? &*tokenizer : nullptr, options.bench);
  const double start_ms = milliseconds_since(begun), start_processor_ms = 1e3 * std::clock() / CLOCKS_PER_SEC;
  if (options.self_test) {
    self_test(pipeline, manifest, graphs, options);
  } else if (options.bench) {
    bench(pipeline, wanted, engine, wanted.steps.value_or(manifest.steps), start_ms, start_processor_ms);
  } else {
    const Image image = pipeline.generate(wanted);
    write_file(*options.out, png_of(image));
    std::printf("%s: %lldx%lld, seed %llu\n", options.out->c_str(), static_cast<long long>(image.width),
                static_cast<long long>(image.height), static_cast<unsigned long long>(wanted.seed));
  }
  return 0;
}

}  // namespace

}  // namespace diffpress

int main(int count, char** arguments) {
  try {
    return diffpress::run(count, arguments);
  } catch (const diffpress::UserError& error) {
    std::fprintf(stderr, "diffpress-run: %s\n", error.what());
    return 2;
  } catch (const std::bad_alloc&) {
    std::fputs("diffpress-run: there is not enough memory. Close other programs, or use a smaller model.\n", stderr);
    return 2;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "diffpress-run: an internal fault: %s\n", error.what());
    return 1;
  }
}
