// Runs each model of a folder on the sample beside it and compares what comes out with what is expected.
//
//   g++ -std=c++17 -O2 smoke.cpp -I INCLUDE -L LIB -lonnxruntime -Wl,-rpath,LIB -o smoke && ./smoke [FOLDER]
//
// INCLUDE is the folder with onnxruntime_cxx_api.h, LIB the one with libonnxruntime. Needs nothing else. Ends with 1
// where an output is off, with 2 where the folder can't be used.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <exception>
#include <fstream>
#include <iterator>
#include <limits>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include <onnxruntime_cxx_api.h>

// ---------------------------------------------------------------- as much of JSON as a manifest needs

struct Json {
  std::string text;  // of a string; of a number, true, false and null as they are written
  std::vector<Json> items;
  std::vector<std::pair<std::string, Json>> members;

  const Json& operator[](const std::string& key) const {
    for (const auto& member : members) {
      if (member.first == key) return member.second;
    }
    throw std::runtime_error("manifest.json lacks " + key);
  }
  double number() const { return std::stod(text); }
};

class Parser {
 public:
  explicit Parser(const std::string& text) : text_(text) {}

  Json value() {
    Json found;
    const char first = next();
    if (first == '{') {
      each('}', [&] {
        std::string key = string();
        expect(':');
        found.members.emplace_back(std::move(key), value());
      });
    } else if (first == '[') {
      each(']', [&] { found.items.push_back(value()); });
    } else if (first == '"') {
      found.text = string();
    } else {
      while (at_ < text_.size() && !std::strchr(",]} \n\r\t", text_[at_])) found.text += text_[at_++];
    }
    return found;
  }

 private:
  char next() {  // what comes behind white space; it is not taken
    while (at_ < text_.size() && std::strchr(" \n\r\t", text_[at_])) ++at_;
    if (at_ == text_.size()) throw std::runtime_error("manifest.json is cut short");
    return text_[at_];
  }

  void expect(char wanted) {
    if (next() != wanted) throw std::runtime_error("manifest.json is no JSON");
    ++at_;
  }

  template <typename Member>
  void each(char end, Member member) {
    ++at_;
    while (next() != end) {
      member();
      if (next() != end) expect(',');
    }
    ++at_;
  }

  std::string string() {
    expect('"');
    std::string found;
    while (at_ < text_.size() && text_[at_] != '"') {
      char c = text_[at_++];
      if (c == '\\') {
        c = text_.at(at_++);
        if (c == 'u') {
          append(found, std::stoul(text_.substr(at_, 4), nullptr, 16));
          at_ += 4;
          continue;
        }
        const std::string letters = "nrtbf";
        const std::size_t which = letters.find(c);
        if (which != std::string::npos) c = "\n\r\t\b\f"[which];
      }
      found += c;
    }
    expect('"');
    return found;
  }

  static void append(std::string& text, unsigned long code) {  // as UTF-8
    if (code < 0x80) {
      text += static_cast<char>(code);
    } else if (code < 0x800) {
      text += static_cast<char>(0xC0 | code >> 6);
      text += static_cast<char>(0x80 | (code & 0x3F));
    } else {
      text += static_cast<char>(0xE0 | code >> 12);
      text += static_cast<char>(0x80 | (code >> 6 & 0x3F));
      text += static_cast<char>(0x80 | (code & 0x3F));
    }
  }

  const std::string& text_;
  std::size_t at_ = 0;
};

// ---------------------------------------------------------------- tensors

struct Kind {
  ONNXTensorElementDataType type;
  std::size_t bytes;
};

const std::map<std::string, Kind> kinds = {
    {"float32", {ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT, 4}},  {"float64", {ONNX_TENSOR_ELEMENT_DATA_TYPE_DOUBLE, 8}},
    {"float16", {ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16, 2}}, {"bool", {ONNX_TENSOR_ELEMENT_DATA_TYPE_BOOL, 1}},
    {"int8", {ONNX_TENSOR_ELEMENT_DATA_TYPE_INT8, 1}},       {"uint8", {ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8, 1}},
    {"int16", {ONNX_TENSOR_ELEMENT_DATA_TYPE_INT16, 2}},     {"uint16", {ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT16, 2}},
    {"int32", {ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32, 4}},     {"uint32", {ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT32, 4}},
    {"int64", {ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64, 8}},     {"uint64", {ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT64, 8}},
};

std::vector<char> read(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) throw std::runtime_error(path + " can't be read");
  return {std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
}

std::vector<std::int64_t> shape_of(const Json& tensor) {
  std::vector<std::int64_t> found;
  for (const Json& size : tensor["shape"].items) found.push_back(std::stoll(size.text));
  return found;
}

// The number that 16 bits stand for as a half float: a sign, 5 bits of exponent, 10 of the fraction.
double half(std::uint16_t bits) {
  const int exponent = bits >> 10 & 31, fraction = bits & 1023;
  const double sign = bits >> 15 ? -1 : 1;
  if (exponent == 31) return fraction ? std::nan("") : sign * HUGE_VAL;
  return sign * (exponent ? std::ldexp(1 + fraction / 1024.0, exponent - 15) : std::ldexp(fraction / 1024.0, -14));
}

template <typename T>
long double at(const void* data, std::size_t k) {
  T value;
  std::memcpy(&value, static_cast<const char*>(data) + k * sizeof(T), sizeof(T));
  return static_cast<long double>(value);
}

long double element(ONNXTensorElementDataType type, const void* data, std::size_t k) {
  switch (type) {
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT: return at<float>(data, k);
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_DOUBLE: return at<double>(data, k);
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16: return half(static_cast<std::uint16_t>(at<std::uint16_t>(data, k)));
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_INT8: return at<std::int8_t>(data, k);
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_INT16: return at<std::int16_t>(data, k);
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT16: return at<std::uint16_t>(data, k);
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32: return at<std::int32_t>(data, k);
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT32: return at<std::uint32_t>(data, k);
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64: return at<std::int64_t>(data, k);
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT64: return at<std::uint64_t>(data, k);
    default: return at<std::uint8_t>(data, k);
  }
}

// The largest difference: infinite where types or shapes differ, or one is not a number.
double difference(const Ort::Value& found, const Json& wanted, const std::vector<char>& expected) {
  const Kind kind = kinds.at(wanted["dtype"].text);
  const auto info = found.GetTensorTypeAndShapeInfo();
  const std::size_t count = info.GetElementCount();
  if (info.GetElementType() != kind.type || info.GetShape() != shape_of(wanted) ||
      expected.size() != count * kind.bytes) {
    return std::numeric_limits<double>::infinity();
  }
  double largest = 0;
  for (std::size_t k = 0; k < count; ++k) {
    const long double a = element(kind.type, found.GetTensorRawData(), k);
    const long double b = element(kind.type, expected.data(), k);
    if (a == b || (std::isnan(a) && std::isnan(b))) continue;
    const double error = static_cast<double>(std::fabs(a - b));
    largest = std::isnan(error) ? std::numeric_limits<double>::infinity() : std::max(largest, error);
  }
  return largest;
}

// ---------------------------------------------------------------- the test

// Add a provider with its options, by the functions that the runtime has for it.
template <typename Options>
void append(Ort::SessionOptions& session, const std::vector<const char*>& keys, const std::vector<const char*>& values,
            OrtStatus*(ORT_API_CALL* create)(Options**), OrtStatus*(ORT_API_CALL* update)(Options*, const char* const*,
            const char* const*, std::size_t), OrtStatus*(ORT_API_CALL* add)(OrtSessionOptions*, const Options*),
            void(ORT_API_CALL* release)(Options*)) {
  Options* made = nullptr;
  Ort::ThrowOnError(create(&made));
  const std::unique_ptr<Options, void(ORT_API_CALL*)(Options*)> held(made, release);
  Ort::ThrowOnError(update(made, keys.data(), values.data(), keys.size()));
  Ort::ThrowOnError(add(session, made));
}

Ort::SessionOptions options(const Json& model, int threads) {
  Ort::SessionOptions found;
  if (threads > 0) found.SetIntraOpNumThreads(threads);
  for (const auto& entry : model["config"].members) found.AddConfigEntry(entry.first.c_str(), entry.second.text.c_str());
  const std::string provider = model["provider"].text;
  std::vector<const char*> keys, values;
  for (const auto& entry : model["provider_options"].members) {
    keys.push_back(entry.first.c_str());
    values.push_back(entry.second.text.c_str());
  }
  const OrtApi& api = Ort::GetApi();
  if (provider == "CUDAExecutionProvider") {
    append(found, keys, values, api.CreateCUDAProviderOptions, api.UpdateCUDAProviderOptions,
           api.SessionOptionsAppendExecutionProvider_CUDA_V2, api.ReleaseCUDAProviderOptions);
  } else if (provider == "TensorrtExecutionProvider") {
    append(found, keys, values, api.CreateTensorRTProviderOptions, api.UpdateTensorRTProviderOptions,
           api.SessionOptionsAppendExecutionProvider_TensorRT_V2, api.ReleaseTensorRTProviderOptions);
  } else if (provider == "CANNExecutionProvider") {
    append(found, keys, values, api.CreateCANNProviderOptions, api.UpdateCANNProviderOptions,
           api.SessionOptionsAppendExecutionProvider_CANN, api.ReleaseCANNProviderOptions);
  } else if (provider != "CPUExecutionProvider") {
    throw std::runtime_error("this program knows no " + provider + "; add it to options() in smoke.cpp");
  }
  return found;
}

bool smoke(const std::string& folder) {
  const std::vector<char> bytes = read(folder + "/manifest.json");
  const std::string text(bytes.begin(), bytes.end());
  const Json manifest = Parser(text).value();
  const Ort::Env env(ORT_LOGGING_LEVEL_ERROR, "smoke");
  const auto memory = Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault);
  std::vector<std::vector<char>> held;  // the values that the tensors point to
  std::vector<Ort::Value> inputs;
  std::vector<const char*> input_names, output_names;
  for (const Json& tensor : manifest["sample"]["inputs"].items) {
    held.push_back(read(folder + "/" + tensor["file"].text));
    const auto shape = shape_of(tensor);
    inputs.push_back(Ort::Value::CreateTensor(memory, held.back().data(), held.back().size(), shape.data(),
                                              shape.size(), kinds.at(tensor["dtype"].text).type));
    input_names.push_back(tensor["name"].text.c_str());
  }
  const auto& outputs = manifest["sample"]["outputs"].items;
  for (const Json& tensor : outputs) output_names.push_back(tensor["name"].text.c_str());
  bool well = !manifest["models"].items.empty();
  for (const Json& model : manifest["models"].items) {
    const std::string path = folder + "/" + model["file"].text;
    const std::basic_string<ORTCHAR_T> wide(path.begin(), path.end());  // wide on Windows
    Ort::Session session(env, wide.c_str(), options(model, static_cast<int>(manifest["threads"].number())));
    const auto found = session.Run(Ort::RunOptions{nullptr}, input_names.data(), inputs.data(), inputs.size(),
                                   output_names.data(), output_names.size());
    for (std::size_t k = 0; k < outputs.size(); ++k) {
      const double error = difference(found[k], outputs[k], read(folder + "/" + outputs[k]["file"].text));
      const bool ok = error <= outputs[k]["tolerance"].number();
      std::printf("%s %s: error %.3g, allowed %s: %s\n", model["file"].text.c_str(), output_names[k], error,
                  outputs[k]["tolerance"].text.c_str(), ok ? "ok" : "WRONG");
      well = well && ok;
    }
  }
  return well;
}

int main(int count, char** arguments) {
  try {
    return smoke(count > 1 ? arguments[1] : ".") ? 0 : 1;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 2;
  }
}
