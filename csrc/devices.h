// The devices that the engine can use here, and the server that lends them to others.
#pragma once

#include "ggml-backend.h"

#include <cstdint>
#include <shared_mutex>
#include <string>
#include <vector>

namespace reap {

struct DeviceInfo {
    std::string name;         // as --device takes it
    std::string description;
    std::string kind;         // "cpu", "gpu", "igpu", "accel"
    std::string buffer_type;  // as --override-tensor takes it
    uint64_t    free_bytes;
    uint64_t    total_bytes;
};

// Those of this machine, and of the RPC servers in `answering`.
std::vector<DeviceInfo> list_devices(const std::vector<std::string> & answering);

struct BackendInfo {
    std::string name;     // "CPU", "CUDA", "RPC", ...
    std::string library;  // the file that it was loaded from
    size_t      n_devices;
};

std::vector<BackendInfo> list_backends();

// Loads the backends that are modules of their own (GGML_BACKEND_DL) from a folder, once per process: of the CPU's variants the best
// that runs here, of the others what can be loaded. Does nothing where backends are linked. EngineError where no CPU backend runs here.
void load_backends(const std::string & folder);

// The engine's list of devices belongs to the process and is not guarded by the engine: what reads it holds this lock (a session while it
// loads, say), and what adds to it waits for them. Functions of this header take it themselves, unless they say that they want it held.
using DevicesLock = std::shared_lock<std::shared_mutex>;
DevicesLock lock_devices();

// Adds the devices of RPC servers ("host:port") to those of this process, once each. UsageError for a server's name that cannot be,
// EngineError where no device is found there. The engine ends the process where nothing listens: try that before.
void add_rpc_servers(const std::vector<std::string> & endpoints);

// The servers that sessions of this process have added.
std::vector<std::string> rpc_servers();

// The devices that a model is to be loaded on, in order; nothing: the engine's own choice. `names`: as --device takes them, empty for this
// machine's and those of the servers `endpoints`. Servers of an earlier session stay known to the engine, which would take them as well.
// UsageError for a name that is not there. Wants the lock held.
struct DeviceChoice {
    bool                            is_set = false;
    std::vector<ggml_backend_dev_t> devices;
};
DeviceChoice choose_devices(const DevicesLock & lock, const std::vector<std::string> & names, const std::vector<std::string> & endpoints);

// The buffer type that --override-tensor names. UsageError where there is none. Wants the lock held.
ggml_backend_buffer_type_t find_buffer_type(const DevicesLock & lock, const std::string & name);

// Serves this machine's devices over llama.cpp's RPC protocol until the process ends. The protocol trusts every
// machine that connects.
void serve_rpc(const std::string & endpoint, int n_threads);

}  // namespace reap
