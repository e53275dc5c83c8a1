// The functions of the CUDA runtime, cuBLAS and cuBLASLt that torch calls, on the queues of device.hpp.
//
// Loaded before torch (LD_PRELOAD), they take the place of the real libraries' functions of the same names.
#include <driver_types.h>

#include <cstdint>
#include <memory>

#include "device.hpp"

using namespace nullgpu;
using Error = int;

// Succeeds and does nothing, whatever its arguments are.
#define NOTHING(name) \
    Error name(...) { return 0; }
// Succeeds and gives a handle.
#define HANDLE(name) \
    Error name(void** handle, ...) { \
        *handle = new char[16]; \
        return 0; \
    }

struct Moment {
    bool passed = false;
};
struct Event {
    std::shared_ptr<Moment> last;
};

static thread_local int current_device = 0;
constexpr size_t MEMORY = 150000000000;

static void copy(void* target, const void* source, size_t bytes, void* stream) {
    // A copy from ordinary host memory is staged before the call returns, as the runtime does.
    bool is_staged = !device_memory().owns(source) && !pinned_memory().owns(source);
    if (is_staged) {
        std::shared_ptr<char> stage(new char[bytes + 1], std::default_delete<char[]>());
        memcpy(stage.get(), source, bytes);
        put(stream, [=] { memcpy(target, stage.get(), bytes); }, "copy");
    } else {
        put(stream, [=] { memmove(target, source, bytes); }, "copy");
    }
}

extern "C" {

// ---- device
Error cudaGetDeviceCount(int* count) { *count = 8; return 0; }
Error cudaGetDevice(int* device) { *device = current_device; return 0; }
Error cudaSetDevice(int device) { current_device = device; return 0; }
Error cudaDriverGetVersion(int* version) { *version = 13000; return 0; }
Error cudaRuntimeGetVersion(int* version) { *version = 13000; return 0; }
const char* cudaGetErrorString(Error) { return "nullgpu"; }
const char* cudaGetErrorName(Error) { return "nullgpu"; }
Error cudaGetDeviceProperties(cudaDeviceProp* found, int) {
    memset(found, 0, sizeof *found);
    strcpy(found->name, "NVIDIA H100 (nullgpu)");
    found->totalGlobalMem = MEMORY;
    found->major = 9;
    found->warpSize = 32;
    found->multiProcessorCount = 132;
    found->maxThreadsPerBlock = 1024;
    found->maxThreadsPerMultiProcessor = 2048;
    found->maxBlocksPerMultiProcessor = 32;
    found->sharedMemPerBlock = 49152;
    found->sharedMemPerBlockOptin = 232448;
    found->sharedMemPerMultiprocessor = 233472;
    found->regsPerBlock = found->regsPerMultiprocessor = 65536;
    found->l2CacheSize = 62914560;
    found->maxThreadsDim[0] = found->maxThreadsDim[1] = 1024;
    found->maxThreadsDim[2] = 64;
    found->maxGridSize[0] = 2147483647;
    found->maxGridSize[1] = found->maxGridSize[2] = 65535;
    return 0;
}
Error cudaDeviceGetAttribute(int* value, int attribute, int) {
    static const std::map<int, int> known = {
        {cudaDevAttrMaxThreadsPerBlock, 1024},
        {cudaDevAttrMaxGridDimX, 2147483647},
        {cudaDevAttrMaxGridDimY, 65535},
        {cudaDevAttrMaxGridDimZ, 65535},
        {cudaDevAttrMaxSharedMemoryPerBlock, 49152},
        {cudaDevAttrWarpSize, 32},
        {cudaDevAttrMultiProcessorCount, 132},
        {cudaDevAttrMaxThreadsPerMultiProcessor, 2048},
        {cudaDevAttrComputeCapabilityMajor, 9},
        {cudaDevAttrComputeCapabilityMinor, 0},
        {cudaDevAttrMaxSharedMemoryPerMultiprocessor, 233472},
        {cudaDevAttrMaxSharedMemoryPerBlockOptin, 232448},
        {cudaDevAttrMaxBlocksPerMultiprocessor, 32},
    };
    auto found = known.find(attribute);
    *value = found == known.end() ? 1 : found->second;
    return 0;
}
Error cudaDeviceGetPCIBusId(char* text, int size, int) { strncpy(text, "0000:00:00.0", size); return 0; }
Error cudaDeviceCanAccessPeer(int* can, int, int) { *can = 0; return 0; }
Error cudaDeviceGetStreamPriorityRange(int* least, int* greatest) { *least = 0; *greatest = -5; return 0; }
Error cudaDeviceSynchronize() { drain_all(); return 0; }
NOTHING(cudaGetLastError) NOTHING(cudaPeekAtLastError) NOTHING(cudaDeviceEnablePeerAccess)
NOTHING(cudaProfilerStart) NOTHING(cudaProfilerStop)
HANDLE(cudaDeviceGetDefaultMemPool)

// ---- memory
Error cudaMalloc(void** pointer, size_t bytes) { *pointer = device_memory().take(bytes); return 0; }
Error cudaMallocAsync(void** pointer, size_t bytes, void*) { return cudaMalloc(pointer, bytes); }
Error cudaHostAlloc(void** pointer, size_t bytes, unsigned) { *pointer = pinned_memory().take(bytes); return 0; }
Error cudaFree(void*) { drain_all(); return 0; }  // addresses are not given out again
Error cudaMemGetInfo(size_t* free, size_t* total) { *free = MEMORY; *total = MEMORY; return 0; }
NOTHING(cudaFreeAsync) NOTHING(cudaFreeHost) NOTHING(cudaHostRegister) NOTHING(cudaHostUnregister)
NOTHING(cudaMemcpyToSymbol)
Error cudaMemcpyAsync(void* target, const void* source, size_t bytes, int, void* stream) {
    copy(target, source, bytes, stream);
    if (!device_memory().owns(target) && !pinned_memory().owns(target)) drain(stream);
    return 0;
}
Error cudaMemcpy(void* target, const void* source, size_t bytes, int) {
    copy(target, source, bytes, nullptr);
    drain(nullptr);
    return 0;
}
Error cudaMemcpyPeerAsync(void* target, int, const void* source, int, size_t bytes, void* stream) {
    return cudaMemcpyAsync(target, source, bytes, 0, stream);
}
Error cudaMemcpy2DAsync(void* target, size_t target_pitch, const void* source, size_t source_pitch, size_t width,
                        size_t height, int, void* stream) {
    put(stream, [=] {
        for (size_t row = 0; row < height; row++)
            memmove(static_cast<char*>(target) + row * target_pitch,
                    static_cast<const char*>(source) + row * source_pitch, width);
    }, "copy of rows");
    return 0;
}
Error cudaMemsetAsync(void* target, int value, size_t bytes, void* stream) {
    put(stream, [=] { memset(target, value, bytes); }, "fill");
    return 0;
}
Error cudaMemset(void* target, int value, size_t bytes) {
    cudaMemsetAsync(target, value, bytes, nullptr);
    drain(nullptr);
    return 0;
}
Error cudaPointerGetAttributes(cudaPointerAttributes* found, const void* pointer) {
    memset(found, 0, sizeof *found);
    found->type = device_memory().owns(pointer)   ? cudaMemoryTypeDevice
                  : pinned_memory().owns(pointer) ? cudaMemoryTypeHost
                                                  : cudaMemoryTypeUnregistered;
    found->device = current_device;
    found->devicePointer = found->hostPointer = const_cast<void*>(pointer);
    return 0;
}
Error cudaGetSymbolAddress(void** pointer, const void*) {
    static char symbols[1 << 20];
    *pointer = symbols;
    return 0;
}
static Error no_such_driver_function() { return 0; }
Error cudaGetDriverEntryPointByVersion(const char*, void** function, unsigned, unsigned long long, int* result) {
    *function = reinterpret_cast<void*>(no_such_driver_function);
    if (result) *result = 0;
    return 0;
}

// ---- streams and events
HANDLE(cudaStreamCreate) HANDLE(cudaStreamCreateWithFlags) HANDLE(cudaStreamCreateWithPriority)
NOTHING(cudaStreamDestroy) NOTHING(cudaThreadExchangeStreamCaptureMode)
Error cudaStreamGetPriority(void*, int* priority) { *priority = 0; return 0; }
Error cudaStreamIsCapturing(void*, int* status) { *status = 0; return 0; }
Error cudaStreamGetCaptureInfo(void*, int* status, ...) { *status = 0; return 0; }
Error cudaStreamSynchronize(void* stream) { drain(stream); return 0; }
Error cudaStreamQuery(void* stream) {
    std::lock_guard<std::mutex> lock(mutex);
    return stream_of(stream)->idle() ? 0 : cudaErrorNotReady;
}
Error cudaStreamAddCallback(void* stream, void (*function)(void*, int, void*), void* data, unsigned) {
    put(stream, [=] { function(stream, 0, data); }, "callback");
    return 0;
}
Error cudaLaunchHostFunc(void* stream, void (*function)(void*), void* data) {
    put(stream, [=] { function(data); }, "callback");
    return 0;
}
Error cudaEventCreate(void** event) { *event = new Event; return 0; }
Error cudaEventCreateWithFlags(void** event, unsigned) { return cudaEventCreate(event); }
NOTHING(cudaEventDestroy)
Error cudaEventElapsedTime(float* milliseconds, void*, void*) { *milliseconds = 1; return 0; }
Error cudaEventRecord(void* event, void* stream) {
    auto moment = std::make_shared<Moment>();
    {
        std::lock_guard<std::mutex> lock(mutex);
        static_cast<Event*>(event)->last = moment;
    }
    put(stream, [moment] {
        std::lock_guard<std::mutex> lock(mutex);
        moment->passed = true;
    }, "event");
    return 0;
}
Error cudaEventRecordWithFlags(void* event, void* stream, unsigned) { return cudaEventRecord(event, stream); }
static std::shared_ptr<Moment> last_of(void* event) {
    std::lock_guard<std::mutex> lock(mutex);
    return static_cast<Event*>(event)->last;
}
static void wait_until_passed(const std::shared_ptr<Moment>& moment) {
    std::unique_lock<std::mutex> lock(mutex);
    changed.wait(lock, [&] { return moment->passed; });
}
Error cudaStreamWaitEvent(void* stream, void* event, unsigned) {
    if (auto moment = last_of(event)) put(stream, [moment] { wait_until_passed(moment); }, "wait for an event");
    return 0;
}
Error cudaEventSynchronize(void* event) {
    if (auto moment = last_of(event)) wait_until_passed(moment);
    return 0;
}
Error cudaEventQuery(void* event) {
    auto moment = last_of(event);
    std::lock_guard<std::mutex> lock(mutex);
    return !moment || moment->passed ? 0 : cudaErrorNotReady;
}

// ---- kernels
Error cudaFuncGetAttributes(cudaFuncAttributes* found, const void*) {
    memset(found, 0, sizeof *found);
    found->maxThreadsPerBlock = 1024;
    found->numRegs = 32;
    found->binaryVersion = found->ptxVersion = 90;
    found->maxDynamicSharedSizeBytes = 49152;
    return 0;
}
Error cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, ...) { *blocks = 2; return 0; }
NOTHING(cudaFuncSetAttribute) NOTHING(cudaLaunchKernel) NOTHING(cudaLaunchKernelExC) NOTHING(__cudaLaunchKernel)
Error __cudaGetKernel(void** kernel, const void*) { *kernel = reinterpret_cast<void*>(1); return 0; }

// ---- cuBLAS
HANDLE(cublasCreate_v2)
NOTHING(cublasDestroy_v2) NOTHING(cublasSetStream_v2) NOTHING(cublasSetWorkspace_v2) NOTHING(cublasSetMathMode)
NOTHING(cublasSetPointerMode_v2) NOTHING(cublasGemmEx) NOTHING(cublasSgemm_v2) NOTHING(cublasDgemm_v2)
NOTHING(cublasGemmStridedBatchedEx) NOTHING(cublasSgemmStridedBatched) NOTHING(cublasDgemmStridedBatched)
NOTHING(cublasSgemv_v2) NOTHING(cublasDgemv_v2) NOTHING(cublasSdot_v2) NOTHING(cublasDdot_v2) NOTHING(cublasDotEx)
Error cublasGetMathMode(void*, int* mode) { *mode = 0; return 0; }
Error cublasGetPointerMode_v2(void*, int* mode) { *mode = 0; return 0; }
HANDLE(cublasLtMatmulDescCreate) HANDLE(cublasLtMatmulPreferenceCreate) HANDLE(cublasLtMatrixLayoutCreate)
NOTHING(cublasLtMatmulDescDestroy) NOTHING(cublasLtMatmulDescSetAttribute) NOTHING(cublasLtMatmulPreferenceDestroy)
NOTHING(cublasLtMatmulPreferenceSetAttribute) NOTHING(cublasLtMatrixLayoutDestroy) NOTHING(cublasLtMatmul)
NOTHING(cublasLtMatrixLayoutSetAttribute)
size_t cublasLtGetVersion() { return 130000; }
Error cublasLtMatmulAlgoGetHeuristic(void*, void*, void*, void*, void*, void*, void*, int, void* results, int* count) {
    memset(results, 0, 96);  // sizeof(cublasLtMatmulHeuristicResult_t)
    *count = 1;
    return 0;
}
}
