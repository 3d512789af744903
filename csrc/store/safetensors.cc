#include "store/safetensors.h"

#include <algorithm>
#include <array>
#include <tuple>
#include <utility>

#include "base/bytes.h"
#include "base/error.h"
#include "base/json.h"
#include "store/file.h"

namespace sluice {
namespace {

struct DtypeBits {
  std::string_view name;
  std::uint64_t bits;
};

// Every dtype of the format; most are read by nobody here, but a header that holds one is legal.
constexpr std::array kDtypes = {
    DtypeBits{"BOOL", 8},        DtypeBits{"U8", 8},          DtypeBits{"I8", 8},
    DtypeBits{"F8_E5M2", 8},     DtypeBits{"F8_E4M3", 8},     DtypeBits{"F8_E8M0", 8},
    DtypeBits{"F8_E4M3FNUZ", 8}, DtypeBits{"F8_E5M2FNUZ", 8}, DtypeBits{"F4", 4},
    DtypeBits{"F6_E2M3", 6},     DtypeBits{"F6_E3M2", 6},     DtypeBits{"I16", 16},
    DtypeBits{"U16", 16},        DtypeBits{"F16", 16},        DtypeBits{"BF16", 16},
    DtypeBits{"I32", 32},        DtypeBits{"U32", 32},        DtypeBits{"F32", 32},
    DtypeBits{"C64", 64},        DtypeBits{"F64", 64},        DtypeBits{"I64", 64},
    DtypeBits{"U64", 64},
};

[[noreturn]] void refuse(const std::string& what) { throw CheckpointError("safetensors: " + what); }

std::string tensor_name(const std::string& name) { return "tensor \"" + name + "\""; }

std::uint64_t read_number(const Json& value, const std::string& where) {
  const std::uint64_t* number = value.as_uint64();
  if (number == nullptr) {
    refuse(where + ": got " + value.dump().substr(0, 40) + ", expected an integer >= 0");
  }
  return *number;
}

// Bytes that a shape asks for.
std::uint64_t shape_bytes(const TensorInfo& tensor) {
  const auto dtype = std::find_if(kDtypes.begin(), kDtypes.end(), [&](const DtypeBits& known) {
    return known.name == tensor.dtype;
  });
  if (dtype == kDtypes.end()) {
    refuse(tensor_name(tensor.name) + ": got the unknown dtype \"" + tensor.dtype +
           "\"; the file is damaged or written by a newer format");
  }
  std::optional<std::uint64_t> bits = dtype->bits;
  for (const std::int64_t side : tensor.shape) {
    if (bits) bits = checked_mul(*bits, static_cast<std::uint64_t>(side));
  }
  if (!bits) refuse(tensor_name(tensor.name) + ": got a shape whose bytes overflow 64 bits");
  if (*bits % 8 != 0) {
    refuse(tensor_name(tensor.name) + ": got " + std::to_string(*bits) +
           " bits, expected whole bytes");
  }
  return *bits / 8;
}

TensorInfo read_tensor(const std::string& name, const Json& entry, std::uint64_t data_offset) {
  const Json::Object* members = entry.as_object();
  if (members == nullptr) refuse(tensor_name(name) + ": got no object, expected one");
  const Json* dtype = entry.find("dtype");
  const Json* shape = entry.find("shape");
  const Json* offsets = entry.find("data_offsets");
  if (dtype == nullptr || dtype->as_string() == nullptr) {
    refuse(tensor_name(name) + ": got no \"dtype\", expected a string");
  }
  if (shape == nullptr || shape->as_array() == nullptr) {
    refuse(tensor_name(name) + ": got no \"shape\", expected an array");
  }
  if (offsets == nullptr || offsets->as_array() == nullptr || offsets->as_array()->size() != 2) {
    refuse(tensor_name(name) + ": got no \"data_offsets\", expected an array of two");
  }
  if (members->size() != 3) {
    refuse(tensor_name(name) + ": got " + std::to_string(members->size()) +
           " members, expected dtype, shape and data_offsets alone");
  }
  TensorInfo tensor;
  tensor.name = name;
  tensor.dtype = *dtype->as_string();
  for (const Json& side : *shape->as_array()) {
    const std::uint64_t number = read_number(side, tensor_name(name) + ": shape");
    if (number > INT64_MAX) refuse(tensor_name(name) + ": got a side above 2^63 in its shape");
    tensor.shape.push_back(static_cast<std::int64_t>(number));
  }
  const Json::Array& range = *offsets->as_array();
  const std::uint64_t begin = read_number(range[0], tensor_name(name) + ": data_offsets");
  const std::uint64_t end = read_number(range[1], tensor_name(name) + ": data_offsets");
  if (begin > end) {
    refuse(tensor_name(name) + ": got data_offsets [" + std::to_string(begin) + ", " +
           std::to_string(end) + "], expected the first not above the second");
  }
  tensor.bytes = end - begin;
  const std::uint64_t expected = shape_bytes(tensor);
  if (tensor.bytes != expected) {
    refuse(tensor_name(name) + ": got " + std::to_string(tensor.bytes) + " bytes, expected " +
           std::to_string(expected) + " from its dtype and shape");
  }
  const auto offset = checked_add(begin, data_offset);
  if (!offset) refuse(tensor_name(name) + ": got an offset that overflows 64 bits");
  tensor.offset = *offset;
  return tensor;
}

void read_metadata(const Json& entry, std::map<std::string, std::string>& metadata) {
  const Json::Object* members = entry.as_object();
  if (members == nullptr) refuse("__metadata__: got no object, expected one of strings");
  for (const auto& [key, value] : *members) {
    if (value.as_string() == nullptr) {
      refuse("__metadata__: got \"" + key + "\" that is no string, expected strings alone");
    }
    metadata.emplace(key, *value.as_string());
  }
}

// Tensors touch each other from the header to the end of the file: no byte is hidden or shared.
void check_tiling(const SafetensorsHeader& header, std::uint64_t file_bytes) {
  std::uint64_t at = header.header_bytes;
  const std::string* before = nullptr;
  for (const TensorInfo& tensor : header.tensors) {
    const std::string behind =
        before == nullptr ? std::string("the header") : "tensor \"" + *before + "\"";
    if (tensor.offset < at) {
      refuse(tensor_name(tensor.name) + ": got offset " + std::to_string(tensor.offset) +
             ", expected " + std::to_string(at) + "; it overlaps " + behind);
    }
    if (tensor.offset > at) {
      refuse(tensor_name(tensor.name) + ": got offset " + std::to_string(tensor.offset) +
             ", expected " + std::to_string(at) + "; there is a gap behind " + behind);
    }
    const auto end = checked_add(at, tensor.bytes);
    if (!end || *end > file_bytes) {
      refuse(tensor_name(tensor.name) + ": got an end behind the file's " +
             std::to_string(file_bytes) + " bytes; the file was cut: copy it again");
    }
    at = *end;
    before = &tensor.name;
  }
  if (at != file_bytes) {
    refuse("got a file of " + std::to_string(file_bytes) + " bytes, expected " +
           std::to_string(at) + "; bytes trail behind the last tensor");
  }
}

}  // namespace

SafetensorsHeader parse_safetensors_header(std::string_view header, std::uint64_t file_bytes) {
  if (header.size() > kMaxHeaderBytes) {
    refuse("got a header of " + std::to_string(header.size()) + " bytes, expected at most " +
           std::to_string(kMaxHeaderBytes));
  }
  if (header.empty() || header.front() != '{') refuse("got a header that does not begin with '{'");
  const Json document = Json::parse(header);
  SafetensorsHeader out;
  out.header_bytes = 8 + header.size();
  if (out.header_bytes > file_bytes) {
    refuse("got a header of " + std::to_string(header.size()) + " bytes in a file of " +
           std::to_string(file_bytes) + "; the file was cut: copy it again");
  }
  for (const auto& [name, entry] : *document.as_object()) {
    if (name == "__metadata__") {
      read_metadata(entry, out.metadata);
    } else {
      out.tensors.push_back(read_tensor(name, entry, out.header_bytes));
    }
  }
  std::sort(out.tensors.begin(), out.tensors.end(), [](const TensorInfo& a, const TensorInfo& b) {
    return std::tie(a.offset, a.bytes, a.name) < std::tie(b.offset, b.bytes, b.name);
  });
  check_tiling(out, file_bytes);
  return out;
}

std::string read_safetensors_header_text(const ReadFile& file) {
  const auto cut = [&](const std::string& what) {
    return CheckpointError(file.path() + ": safetensors: got " + what);
  };
  if (file.bytes() < 8) {
    throw cut("a file of " + std::to_string(file.bytes()) +
              " bytes, expected at least the 8 of the header's length; copy it again");
  }
  std::array<std::byte, 8> length{};
  file.read_exact(0, length.size(), length.data());
  std::uint64_t header_bytes = 0;
  for (std::size_t i = 0; i < 8; ++i) {
    header_bytes |= std::to_integer<std::uint64_t>(length[i]) << (8 * i);
  }
  if (header_bytes > kMaxHeaderBytes) {
    throw cut("a header length of " + std::to_string(header_bytes) + ", expected at most " +
              std::to_string(kMaxHeaderBytes) + "; this is no safetensors file");
  }
  if (header_bytes > file.bytes() - 8) {
    throw cut("a header length of " + std::to_string(header_bytes) + " in a file of " +
              std::to_string(file.bytes()) + " bytes; the file was cut: copy it again");
  }
  std::string text(header_bytes, '\0');
  file.read_exact(8, text.size(), reinterpret_cast<std::byte*>(text.data()));
  return text;
}

SafetensorsHeader read_safetensors_header(const std::string& path) {
  const ReadFile file(path, false);
  const std::string text = read_safetensors_header_text(file);
  try {
    SafetensorsHeader header = parse_safetensors_header(text, file.bytes());
    header.file = file.identity();
    return header;
  } catch (const CheckpointError& error) {
    throw CheckpointError(path + ": " + error.what());
  }
}

}  // namespace sluice
