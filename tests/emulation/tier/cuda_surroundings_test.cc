// The engine on a device that is not the current one, of older code, and beside the captures of
// others: what a process does with CUDA beside sluice.
#include <gtest/gtest.h>

#include <map>
#include <thread>

#include "tests/emulation/tier/cuda_rig.h"

namespace sluice::testing {
namespace {

struct CudaSurroundings : ::testing::Test {
  ModelShape shape{.dtype = DType::kBF16};
  Model model{shape, 7};
  std::mt19937_64 rng{11};

  EngineOptions options(std::int64_t slots) const {
    return {.device_memory = model.slots(slots), .host_memory = model.slots(16)};
  }
  Call call(const ModelShape& of, std::int32_t layer = 0) {
    return make_call(of, layer, {.num_tokens = 3, .top_k = 3, .activations = of.dtype}, rng);
  }
  static int current_device() {
    int device = -1;
    must(cudaGetDevice(&device));
    return device;
  }
};

TEST_F(CudaSurroundings, AModelOnAnotherDeviceThanTheCurrentOne) {
  ModelShape with_callback{.dtype = DType::kBF16};
  with_callback.generic_gate = true;
  for (const ModelShape& each : {shape, with_callback}) {
    const Model placed(each, 7);
    const Call one = call(each);
    std::vector<std::byte> expected;
    for (const bool user_stream : {false, true}) {
      for (const int current : {1, 0}) {
        begin({.policy = fake::Policy::kRandom}, {.num_devices = 2});
        {
          must(cudaSetDevice(1));  // where torch puts tensors and streams of cuda:1
          EngineOptions budget = {.device_memory = placed.slots(2),
                                  .host_memory = placed.slots(16)};
          CudaRig rig(placed, budget, user_stream, 4096, 1);
          const CallOnDevice on_device(one, rig.stream());
          must(cudaSetDevice(each.generic_gate ? 1 : current));
          rig.engine().forward(on_device.args());
          EXPECT_EQ(current_device(), each.generic_gate ? 1 : current) << "the caller's comes back";
          must(cudaSetDevice(1));
          const std::vector<std::byte> out = on_device.out();
          if (expected.empty()) expected = out;
          EXPECT_EQ(out, expected);
          must(cudaSetDevice(0));
          rig.engine().close();
          EXPECT_EQ(current_device(), 0);
        }
        expect_nothing_left();
      }
    }
  }
}

TEST_F(CudaSurroundings, OwnThreadsDoNotTouchTheFirstDevice) {
  begin({}, {.num_devices = 2});
  must(cudaSetDevice(1));
  const int mine = fake::call_log().back().thread;  // nobody else is there yet
  {
    CudaRig rig(model, options(2), false, 4096, 1);
    const std::size_t mark = fake::num_calls();
    for (int i = 0; i < 4; ++i) (void)rig.forward(call(shape, i % 2));
    rig.engine().drain();
    const std::vector<fake::Call> log = fake::call_log();
    std::map<int, int> choices;  // by thread
    for (std::size_t i = mark; i < log.size(); ++i) {
      if (log[i].api == fake::Api::kSetDevice) ++choices[log[i].thread];
    }
    EXPECT_EQ(choices[mine], 0) << "the caller's is the device";
    for (const auto& [thread, count] : choices) EXPECT_LE(count, 1) << "thread " << thread;
  }
  must(cudaSetDevice(0));
  expect_nothing_left();
}

TEST_F(CudaSurroundings, OlderDevicesAndOlderCodeChainNoKernels) {
  const Call one = call(shape);
  std::vector<std::byte> expected;
  struct Machine {
    int major;
    int code;
  };
  for (const Machine& machine : {Machine{9, 0}, Machine{8, 0}, Machine{9, 80}}) {
    fake::Options device;
    device.model.compute_major = machine.major;
    device.model.code_version = machine.code;
    begin({.policy = fake::Policy::kLazy}, device);
    {
      CudaRig rig(model, options(16), true);
      const std::vector<std::byte> out = rig.forward(one);
      if (expected.empty()) expected = out;
      EXPECT_EQ(out, expected) << machine.major << ", " << machine.code;
      const bool chains = machine.major >= 9 && machine.code == 0;
      EXPECT_EQ(fake::stats().early_prologues > 0, chains) << machine.major << ", " << machine.code;
    }
    expect_nothing_left();
  }
}

TEST_F(CudaSurroundings, CapturesOfOthersGoOnAndSoDoesTheSession) {
  for (const auto mode : {cudaStreamCaptureModeGlobal, cudaStreamCaptureModeThreadLocal}) {
    for (const bool by_the_caller : {false, true}) {
      begin({.policy = fake::Policy::kLazy});
      {
        CudaRig rig(model, options(16), true);
        const CallOnDevice before(call(shape), rig.stream());
        const CallOnDevice during(call(shape, 1), rig.stream());
        rig.engine().forward(before.args());

        cudaStream_t captured = nullptr;
        cudaGraph_t graph = nullptr;
        must(cudaStreamCreateWithFlags(&captured, cudaStreamNonBlocking));
        const auto hints_and_forward = [&] {
          std::vector<Hint> hints;
          for (int e = 0; e < 8; ++e) {
            hints.push_back({.key = make_key(1, e), .probability = 0.5});
          }
          rig.engine().hint(hints);
          rig.engine().forward(during.args());
        };
        must(cudaStreamBeginCapture(captured, mode));
        if (by_the_caller) {
          hints_and_forward();
        } else {
          std::thread(hints_and_forward).join();
        }
        EXPECT_EQ(cudaStreamEndCapture(captured, &graph), cudaSuccess) << fake::last_failure();
        must(cudaGraphDestroy(graph));
        must(cudaStreamDestroy(captured));
        (void)before.out();
        (void)during.out();
        (void)rig.forward(call(shape));
      }
      expect_nothing_left();
    }
  }
}

}  // namespace
}  // namespace sluice::testing
