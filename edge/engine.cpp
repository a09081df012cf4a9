#include "engine.h"

#include <dlfcn.h>

#include <algorithm>
#include <functional>
#include <numeric>

#include "errors.h"

namespace diffpress {

namespace {

ONNXTensorElementDataType element(Type type) {
  if (type == Type::float32) return ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
  return type == Type::int8 ? ONNX_TENSOR_ELEMENT_DATA_TYPE_INT8 : ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64;
}

// Where the C interface cannot fail but by a fault of ours.
void must(const OrtApi* api, OrtStatus* status) {
  if (!status) return;
  const std::string words = api->GetErrorMessage(status);
  api->ReleaseStatus(status);
  throw std::logic_error(words);
}

bool fits(const std::vector<std::int64_t>& shape, const std::vector<std::int64_t>& port) {
  return shape.size() == port.size() && std::equal(shape.begin(), shape.end(), port.begin(),
                                                   [](std::int64_t side, std::int64_t own) { return own == -1 || side == own; });
}

}  // namespace

std::vector<std::int64_t> Tensor::shape() const {
  const OrtApi* api = std::get_deleter<Release>(value_)->api;
  OrtTensorTypeAndShapeInfo* info;
  must(api, api->GetTensorTypeAndShape(value(), &info));
  std::size_t sides;
  must(api, api->GetDimensionsCount(info, &sides));
  std::vector<std::int64_t> shape(sides);
  must(api, api->GetDimensions(info, shape.data(), sides));
  api->ReleaseTensorTypeAndShapeInfo(info);
  return shape;
}

std::size_t Tensor::count() const {
  const auto sides = shape();
  return std::accumulate(sides.begin(), sides.end(), std::size_t{1}, std::multiplies<>());
}

ONNXTensorElementDataType Tensor::type() const {
  const OrtApi* api = std::get_deleter<Release>(value_)->api;
  OrtTensorTypeAndShapeInfo* info;
  must(api, api->GetTensorTypeAndShape(value(), &info));
  ONNXTensorElementDataType found;
  must(api, api->GetTensorElementType(info, &found));
  api->ReleaseTensorTypeAndShapeInfo(info);
  return found;
}

void* Tensor::bytes() const {
  const OrtApi* api = std::get_deleter<Release>(value_)->api;
  void* found;
  must(api, api->GetTensorMutableData(value(), &found));
  return found;
}

Engine::Engine(const std::string& library, int threads) {
  void* handle = dlopen(library.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (!handle) throw UserError("onnxruntime cannot be opened (" + std::string(dlerror()) + "). README.txt says which library goes there.");
  const auto base_of = reinterpret_cast<const OrtApiBase* (*)()>(dlsym(handle, "OrtGetApiBase"));
  if (!base_of) throw UserError(library + " is no onnxruntime. README.txt says which library goes there.");
  const OrtApiBase* base = base_of();
  version_ = base->GetVersionString();
  api_ = base->GetApi(ORT_API_VERSION);
  if (!api_)
    throw UserError(library + " is onnxruntime " + version_ + ": 1." + std::to_string(ORT_API_VERSION) + " or newer is needed.");
  // What is wrong comes back as a status, and is said once.
  check(api_->CreateEnv(ORT_LOGGING_LEVEL_FATAL, "diffpress", &env_), "onnxruntime");
  check(api_->GetAllocatorWithDefaultOptions(&allocator_), "onnxruntime");
  check(api_->CreateSessionOptions(&options_), "onnxruntime");
  check(api_->SetIntraOpNumThreads(options_, threads), "onnxruntime");
  // As export/engines/onnxruntime.py opens graphs, which says why.
  check(api_->AddSessionConfigEntry(options_, "session.qdq_matmulnbits_accuracy_level", "1"), "onnxruntime");
  check(api_->AddSessionConfigEntry(options_, "optimization.disable_specified_optimizers", "MatMulAddFusion"), "onnxruntime");
}

Engine::~Engine() {
  if (options_) api_->ReleaseSessionOptions(options_);
  if (env_) api_->ReleaseEnv(env_);
}

std::string Engine::version() const { return version_; }

void Engine::check(OrtStatus* status, const std::string& what) const {
  if (!status) return;
  std::string words = api_->GetErrorMessage(status);
  api_->ReleaseStatus(status);
  std::replace(words.begin(), words.end(), '\n', ' ');
  throw UserError(what + ": onnxruntime " + version_ + " refuses it (" + words + "). Export and package it again.");
}

template <typename Number>
Tensor Engine::tensor(const std::vector<std::int64_t>& shape) const {
  const auto type = std::is_same_v<Number, float> ? ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT : ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64;
  OrtValue* value;
  check(api_->CreateTensorAsOrtValue(allocator_, shape.data(), shape.size(), type, &value), "memory");
  return Tensor(api_, value);
}

template Tensor Engine::tensor<float>(const std::vector<std::int64_t>&) const;
template Tensor Engine::tensor<std::int64_t>(const std::vector<std::int64_t>&) const;

Session::Session(const Engine& engine, const std::string& path, const Graph& graph)
    : engine_(engine), graph_(graph), session_(nullptr, engine.api()->ReleaseSession) {
  OrtSession* session;
  engine.check(engine.api()->CreateSession(engine.env_, path.c_str(), engine.options_, &session), path);
  session_.reset(session);
}

Tensors Session::run(const Tensors& inputs) const {
  std::vector<const char*> names, wanted;
  std::vector<const OrtValue*> values;
  for (const Port& port : graph_.inputs) {
    const auto given = inputs.find(port.name);
    if (given == inputs.end()) throw UserError(graph_.file + " asks for " + port.name + ", which nothing gives. Export and package it again.");
    if (given->second.type() != element(port.type) || !fits(given->second.shape(), port.shape))
      throw UserError(graph_.file + ": " + port.name + " has another shape or type than export.json says. Export and package it again.");
    names.push_back(port.name.c_str());
    values.push_back(given->second.value());
  }
  for (const Port& port : graph_.outputs) wanted.push_back(port.name.c_str());
  std::vector<OrtValue*> made(wanted.size(), nullptr);
  OrtStatus* status = engine_.api()->Run(session_.get(), nullptr, names.data(), values.data(), names.size(), wanted.data(),
                                         wanted.size(), made.data());
  engine_.check(status, graph_.file);
  Tensors outputs;
  for (std::size_t i = 0; i < made.size(); ++i) outputs.emplace(wanted[i], Tensor(engine_.api(), made[i]));
  for (const Port& port : graph_.outputs) {
    const Tensor& own = outputs.at(port.name);
    if (own.type() != element(port.type) || !fits(own.shape(), port.shape))
      throw UserError(graph_.file + ": " + port.name + " has another shape or type than export.json says. Export and package it again.");
  }
  return outputs;
}

}  // namespace diffpress
