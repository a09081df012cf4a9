#include "manifest.h"

#include <cmath>
#include <limits>

#include "errors.h"
#include "third_party/nlohmann/json.hpp"

namespace diffpress {

namespace {

using Json = nlohmann::json;

constexpr std::int64_t kBundleSchema = 1, kExportSchema = 5;
constexpr std::int64_t kMostSteps = 10000, kMostKept = 64, kMostOperations = 64, kLongestSide = 1 << 16, kMostNumbers = 1ll << 31;
// Of nested values: what diffpress writes has seven.
constexpr int kDeepest = 16;

struct Damage : std::runtime_error {
  using std::runtime_error::runtime_error;
};

[[noreturn]] void damaged(const std::string& what) { throw Damage(what); }

const Json& member(const Json& from, const char* key) {
  if (!from.is_object() || !from.contains(key)) damaged(std::string("it lacks ") + key);
  return from[key];
}

const Json& list(const Json& from, const char* key) {
  const Json& found = member(from, key);
  if (!found.is_array()) damaged(std::string(key) + " is no list");
  return found;
}

const Json& object(const Json& from, const char* key) {
  const Json& found = member(from, key);
  if (!found.is_object()) damaged(std::string(key) + " is no object");
  return found;
}

std::string text(const Json& value, const char* what) {
  if (!value.is_string()) damaged(std::string(what) + " is no text");
  const auto& found = value.get_ref<const std::string&>();
  if (found.find('\0') != std::string::npos) damaged(std::string(what) + " has a zero in it");
  return found;
}

std::int64_t whole(const Json& value, const char* what, std::int64_t least, std::int64_t most) {
  const bool fits = value.is_number_integer() &&
                    !(value.is_number_unsigned() &&
                      value.get<std::uint64_t>() > static_cast<std::uint64_t>(std::numeric_limits<std::int64_t>::max()));
  if (!fits || value.get<std::int64_t>() < least || value.get<std::int64_t>() > most)
    damaged(std::string(what) + " is no whole number from " + std::to_string(least) + " to " + std::to_string(most));
  return value.get<std::int64_t>();
}

double number(const Json& value, const char* what) {
  if (!value.is_number() || !std::isfinite(value.get<double>())) damaged(std::string(what) + " is no number");
  return value.get<double>();
}

float small_number(const Json& value, const char* what) {
  const double found = number(value, what);
  if (std::fabs(found) > std::numeric_limits<float>::max()) damaged(std::string(what) + " is too large");
  return static_cast<float>(found);
}

std::vector<float> numbers(const Json& values, const char* what) {
  if (!values.is_array()) damaged(std::string(what) + " is no list");
  std::vector<float> found;
  for (const Json& value : values) found.push_back(small_number(value, what));
  return found;
}

std::size_t steps_of(const std::string& key) {
  const bool decimal = !key.empty() && key.size() < 6 && key.find_first_not_of("0123456789") == std::string::npos;
  const std::size_t found = decimal ? std::stoul(key) : 0;
  if (found < 1 || found > kMostSteps) damaged("\"" + key + "\" is no number of steps");
  return found;
}

Type type_of(const std::string& name) {
  if (name == "float32") return Type::float32;
  if (name == "int8") return Type::int8;
  if (name == "int64") return Type::int64;
  damaged("the dtype " + name + " is unknown");
}

Port port(const Json& from) {
  Port found{text(member(from, "name"), "name"), type_of(text(member(from, "dtype"), "dtype")), {}};
  std::int64_t size = 1;
  for (const Json& side : list(from, "shape")) {
    const bool batch = side.is_string() && side.get<std::string>() == "batch";
    found.shape.push_back(batch ? -1 : whole(side, "shape", 1, kLongestSide));
    size *= batch ? 1 : found.shape.back();
    if (size > kMostNumbers || found.shape.size() > 8) damaged("the shape of " + found.name + " is out of all bounds");
  }
  return found;
}

Graph graph(const Json& from) {
  Graph found{text(member(from, "file"), "file"), {}, {}};
  for (const Json& value : list(from, "inputs")) found.inputs.push_back(port(value));
  for (const Json& value : list(from, "outputs")) found.outputs.push_back(port(value));
  if (found.outputs.empty()) damaged(found.file + " has no output");
  return found;
}

Labels labels(const Json& from) {
  constexpr std::int64_t most = std::numeric_limits<std::int32_t>::max();
  Labels found{whole(member(from, "count"), "count", 1, most), whole(member(from, "null"), "null", 0, most), {}};
  for (const auto& [name, value] : object(from, "names").items()) found.names[name] = whole(value, "names", 0, most);
  return found;
}

// Takes up only terms that there are: those before `term`.
Operation operation(const Json& from, std::size_t term) {
  constexpr float most = std::numeric_limits<float>::infinity();
  Operation found{member(from, "weights").is_null(), {}, -most, most};
  if (found.draws) return found;
  for (const Json& weight : list(from, "weights")) {
    if (!weight.is_array() || weight.size() != 2) damaged("a weight is no pair");
    const std::int64_t own = whole(weight[0], "weights", 0, static_cast<std::int64_t>(term) - 1);
    found.weights.emplace_back(static_cast<std::size_t>(own), small_number(weight[1], "weights"));
  }
  if (!member(from, "low").is_null()) found.low = small_number(from["low"], "low");
  if (!member(from, "high").is_null()) found.high = small_number(from["high"], "high");
  if (found.low > found.high) damaged("a sum is clipped to nothing");
  return found;
}

std::vector<std::vector<Operation>> updates(const Json& from) {
  std::vector<std::vector<Operation>> found;
  std::size_t term = 1;
  for (const Json& update : list(from, "updates")) {
    if (!update.is_array() || update.empty() || update.size() > static_cast<std::size_t>(kMostOperations)) damaged("an update has no operations");
    ++term;
    found.emplace_back();
    for (const Json& own : update) found.back().push_back(operation(own, term++));
    if (found.back().back().draws) damaged("an update ends in no sample");
  }
  return found;
}

Schedule schedule(const Json& from) {
  Schedule found{small_number(member(from, "init_noise_sigma"), "init_noise_sigma"), numbers(list(from, "timesteps"), "timesteps"),
                 numbers(list(from, "input_scale"), "input_scale"), {}, {}};
  const bool updated = from.contains("updates") && !from["updates"].is_null();
  if (updated) found.updates = updates(from);
  for (const Json& row : list(from, "coefficients")) {
    found.coefficients.push_back(numbers(row, "coefficients"));
    if (found.coefficients.back().size() != found.coefficients.size() + 1) damaged("a row of coefficients has another length");
  }
  const std::size_t calls = found.timesteps.size();
  if (calls < 1 || calls > kMostSteps || found.input_scale.size() != calls ||
      (updated ? found.updates.size() : found.coefficients.size()) != calls)
    damaged("a schedule has no numbers for some of its calls");
  return found;
}

PlannedCall planned_call(const Json& from) {
  PlannedCall found{text(member(from, "graph"), "graph"), {}, whole(member(from, "correction"), "correction", 0, kLongestSide)};
  for (const Json& row : list(from, "forecast")) {
    found.forecast.push_back(numbers(row, "forecast"));
    if (found.forecast.back().empty() || found.forecast.back().size() != found.forecast.front().size())
      damaged("rows of a forecast have different lengths");
  }
  return found;
}

StepPlan step_plan(const Json& from) {
  StepPlan found;
  for (const Json& value : list(from, "kept"))
    found.kept.push_back({text(member(value, "name"), "name"),
                          static_cast<std::size_t>(whole(member(value, "count"), "count", 1, kMostKept))});
  for (const auto& [steps, calls] : object(from, "calls").items())
    for (const Json& call : calls) found.calls[steps_of(steps)].push_back(planned_call(call));
  return found;
}

std::optional<double> optional_number(const Json& from, const char* key) {
  const Json& value = member(from, key);
  return value.is_null() ? std::nullopt : std::optional(number(value, key));
}

SelfTest self_test(const Json& from) {
  return {text(member(from, "condition"), "condition"),
          text(member(from, "image"), "image"),
          static_cast<std::uint64_t>(whole(member(from, "seed"), "seed", 0, std::numeric_limits<std::int64_t>::max())),
          static_cast<std::size_t>(whole(member(from, "steps"), "steps", 1, kMostSteps)),
          optional_number(from, "guidance_scale"),
          number(member(from, "tolerance"), "tolerance")};
}

std::optional<bool> conditional_first(const Json& from) {
  const Json& value = member(from, "first_half");
  if (value.is_null()) return std::nullopt;
  const std::string half = text(value, "first_half");
  if (half != "conditional" && half != "unconditional") damaged("first_half is " + half);
  return half == "conditional";
}

bool has_input(const Graph& graph, const std::string& name) {
  for (const Port& port : graph.inputs)
    if (port.name == name) return true;
  return false;
}

// Every call has a graph whose inputs there is something for, and runs begin with one that takes up nothing.
void check_plan(const Export& found) {
  for (const auto& [steps, table] : found.schedules) {
    const auto calls = found.step_plan->calls.find(steps);
    const bool known = calls != found.step_plan->calls.end() && calls->second.size() == table.timesteps.size() &&
                       calls->second.front().graph == "denoiser";
    if (!known) damaged("the step plan does not fit " + std::to_string(steps) + " steps");
    for (const PlannedCall& call : calls->second) {
      const auto graph = found.components.find(call.graph);
      if (graph == found.components.end()) damaged("the step plan calls " + call.graph + ", which is no component");
      if (has_input(graph->second, "forecast") && call.forecast.empty()) damaged("a call of " + call.graph + " lacks its forecast");
    }
  }
}

void check_components(const Export& found) {
  const auto need = [&](const char* name) {
    if (!found.components.count(name)) damaged(std::string("it has no ") + name);
  };
  need("denoiser");
  if (found.takes_prompt) need("text_encoder");
  if (!found.schedules.count(found.steps) || !found.schedules.count(found.self_test.steps)) damaged("it has no schedule for its own steps");
  const auto [channels, height, width] = found.latent_shape;
  for (const auto& [steps, table] : found.schedules)
    if (channels * height > kMostNumbers / width / static_cast<std::int64_t>(table.timesteps.size() + 1))
      damaged("latent_shape is out of all bounds");
}

// What does not depend on the whole tree being well shaped: how deep values nest, before recursion meets them.
Json parsed(const std::string& content) {
  const auto limit = [](int depth, Json::parse_event_t, Json&) {
    if (depth > kDeepest) damaged("values are nested too deeply");
    return true;
  };
  Json found = Json::parse(content, limit);
  if (!found.is_object()) damaged("it is no object");
  return found;
}

void check_schema(const Json& from, std::int64_t known) {
  const std::int64_t schema = whole(member(from, "schema_version"), "schema_version", 1, kLongestSide);
  if (schema > known)
    throw UserError("the bundle was made by a newer diffpress (schema " + std::to_string(schema) + ", this runner reads up to " +
                    std::to_string(known) + "): use the runner that came with it.");
}

template <typename Read>
auto reading(const char* file, const std::string& content, Read read) -> decltype(read(Json())) {
  try {
    return read(parsed(content));
  } catch (const Damage& error) {
    throw UserError(std::string(file) + " is damaged: " + error.what() + ". Unzip the bundle again.");
  } catch (const Json::exception& error) {
    throw UserError(std::string(file) + " is damaged: it is no JSON that diffpress writes. Unzip the bundle again.");
  }
}

Bundle bundle(const Json& from) {
  check_schema(from, kBundleSchema);
  Bundle found{text(member(from, "target"), "target"), text(member(from, "folder"), "folder"),
               text(member(from, "library"), "library"), std::nullopt, std::nullopt, {}};
  if (!member(from, "tokenizer").is_null()) found.tokenizer = text(from["tokenizer"], "tokenizer");
  constexpr std::int64_t most = std::numeric_limits<std::int64_t>::max();
  if (!member(from, "peak_memory_bytes").is_null())
    found.peak_memory_bytes = static_cast<std::uint64_t>(whole(from["peak_memory_bytes"], "peak_memory_bytes", 0, most));
  for (const auto& [name, file] : object(from, "files").items())
    found.files[name] = {static_cast<std::uint64_t>(whole(member(file, "size_bytes"), "size_bytes", 0, most)),
                         text(member(file, "sha256"), "sha256")};
  return found;
}

Export whole_export(const Json& from) {
  check_schema(from, kExportSchema);
  Export found;
  for (const auto& [name, value] : object(from, "components").items()) found.components[name] = graph(value);
  const Json& latent = list(from, "latent_shape");
  if (latent.size() != 3) damaged("latent_shape has not three sides");
  for (std::size_t i = 0; i < 3; ++i) found.latent_shape[i] = whole(latent[i], "latent_shape", 1, kLongestSide);
  found.scaling_factor = small_number(member(from, "scaling_factor"), "scaling_factor");
  found.takes_prompt = !member(from, "tokens").is_null();
  if (!member(from, "labels").is_null()) found.labels = labels(from["labels"]);
  found.conditional_first = conditional_first(from);
  found.steps = static_cast<std::size_t>(whole(member(from, "steps"), "steps", 1, kMostSteps));
  found.guidance_scale = optional_number(from, "guidance_scale");
  for (const auto& [steps, value] : object(from, "schedules").items()) found.schedules[steps_of(steps)] = schedule(value);
  if (from.contains("step_plan") && !from["step_plan"].is_null()) found.step_plan = step_plan(from["step_plan"]);
  found.self_test = self_test(member(from, "self_test"));
  check_components(found);
  if (found.step_plan) check_plan(found);
  return found;
}

}  // namespace

Bundle parse_bundle(const std::string& content) { return reading("bundle.json", content, bundle); }

Export parse_export(const std::string& content) { return reading("export.json", content, whole_export); }

}  // namespace diffpress
