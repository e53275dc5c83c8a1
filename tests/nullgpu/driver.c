// The few functions of libcuda.so.1 that torch looks up when it is imported; nothing of it is used after that.
typedef int Error;
Error cuInit(unsigned flags) { return 0; }
Error cuDriverGetVersion(int* version) { *version = 13000; return 0; }
Error cuDeviceGetCount(int* count) { *count = 8; return 0; }
Error cuDeviceGet(int* device, int number) { *device = number; return 0; }
Error cuDevicePrimaryCtxGetState(int device, unsigned* flags, int* active) { *flags = 0; *active = 1; return 0; }
Error cuDevicePrimaryCtxRetain(void** context, int device) { *context = (void*)1; return 0; }
Error cuDevicePrimaryCtxRelease(int device) { return 0; }
Error cuCtxGetCurrent(void** context) { *context = (void*)1; return 0; }
Error cuCtxSetCurrent(void* context) { return 0; }
Error cuCtxGetDevice(int* device) { *device = 0; return 0; }
Error cuGetErrorString(int error, const char** text) { *text = "nullgpu"; return 0; }
Error cuGetProcAddress_v2(const char* name, void** function, int version, unsigned long long flags, int* status) {
    *function = 0;
    if (status) *status = 1;
    return 500; /* CUDA_ERROR_NOT_FOUND */
}
