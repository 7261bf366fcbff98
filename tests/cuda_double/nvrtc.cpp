// A stand-in for NVRTC: what it is given is compiled by g++ as C++ for the double, into a shared library that the
// stand-in for the driver loads. The words it is asked with are the real one's; options that g++ does not know are
// dropped.
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <string>

namespace {

constexpr int kCompilation = 6;

struct Program {
  std::string text, log, image;
};

std::string content(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
}

// Without the double, which g++ would be run on as well.
int run(const std::string& command) { return std::system(("env -u LD_PRELOAD " + command).c_str()); }

}  // namespace

extern "C" {

int nvrtcVersion(int* major, int* minor) {
  *major = 13;
  *minor = 0;
  return 0;
}
const char* nvrtcGetErrorString(int result) { return result == kCompilation ? "NVRTC_ERROR_COMPILATION" : "an error"; }

int nvrtcGetNumSupportedArchs(int* count) {
  *count = 1;
  return 0;
}
int nvrtcGetSupportedArchs(int* numbers) {
  numbers[0] = 90;
  return 0;
}

int nvrtcCreateProgram(Program** program, const char* text, const char*, int, const char**, const char**) {
  *program = new Program{text, "", ""};
  return 0;
}
int nvrtcDestroyProgram(Program** program) {
  delete *program;
  return 0;
}

int nvrtcCompileProgram(Program* program, int count, const char** options) {
  char folder[] = "/tmp/nvrtc-double-XXXXXX";
  if (mkdtemp(folder) == nullptr) return kCompilation;
  const std::string at = folder;
  std::ofstream(at + "/rule.cpp") << program->text;
  std::string command = "g++ -std=c++20 -O1 -ffp-contract=off -fno-math-errno -fPIC -shared -DOPTIM_EXT_DEVICE_DOUBLE";
  for (int k = 0; k < count; ++k) {
    if (std::strncmp(options[k], "-I", 2) == 0) command += std::string(" '") + options[k] + "'";
  }
  const int status = run(command + " -o " + at + "/rule.so " + at + "/rule.cpp > " + at + "/log 2>&1");
  program->log = content(at + "/log");
  program->image = content(at + "/rule.so");
  run("rm -rf " + at);
  return status == 0 ? 0 : kCompilation;
}

int nvrtcGetProgramLogSize(Program* program, size_t* bytes) {
  *bytes = program->log.size() + 1;
  return 0;
}
int nvrtcGetProgramLog(Program* program, char* to) {
  std::memcpy(to, program->log.c_str(), program->log.size() + 1);
  return 0;
}
int nvrtcGetCUBINSize(Program* program, size_t* bytes) {
  *bytes = program->image.size();
  return 0;
}
int nvrtcGetCUBIN(Program* program, char* to) {
  std::memcpy(to, program->image.data(), program->image.size());
  return 0;
}

}  // extern "C"
