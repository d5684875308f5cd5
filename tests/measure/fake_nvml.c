/* A FAKE libnvidia-ml.so.1 for tests: a board whose time passes only when fake_spend() says so. It measures nothing.
 *
 * cc -shared -fPIC -Wl,-soname,libnvidia-ml.so.1 -o libnvidia-ml.so.1 fake_nvml.c
 *
 * FAKE_NVML_FAIL="function=code function=code ..." (read at every call) makes functions return NVML error codes; FAKE_NVML_NAME
 * and FAKE_NVML_DRIVER rename the device, FAKE_NVML_MIG=1 turns MIG on, FAKE_NVML_PROCESSES=n has n of them use it, and
 * FAKE_NVML_GAIN=g makes power readings g times too high. The counter ticks every 100 ms.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define TICK_S 0.1
#define UUID "GPU-00000000-0000-0000-0000-00000000fa4e"

typedef struct {
    unsigned field, scope;
    long long timestamp, latency;
    int type, status;
    union { double d; unsigned ui; unsigned long long ull; } value;
} Field;

static double now, next_tick = TICK_S, joules, shown_joules = 1e6, watts = 60, shown_watts = 60;

static int status(const char *function) {
    const char *list = getenv("FAKE_NVML_FAIL");
    char key[96];
    snprintf(key, sizeof key, "%s=", function);
    const char *found = list ? strstr(list, key) : NULL;
    return found ? atoi(found + strlen(key)) : 0;
}

static int text(const char *function, const char *variable, const char *fallback, char *out, unsigned size) {
    const char *value = getenv(variable);
    snprintf(out, size, "%s", value ? value : fallback);
    return status(function);
}

double fake_now(void) { return now; }

void fake_spend(double seconds, double power) {
    double end = now + seconds;
    watts = power;
    while (next_tick <= end) {
        joules += watts * (next_tick - now);
        now = next_tick;
        next_tick += TICK_S;
        shown_joules = 1e6 + joules;
        shown_watts = watts;
    }
    joules += watts * (end - now);
    now = end;
}

int nvmlInitWithFlags(unsigned flags) { (void)flags; return status("nvmlInit"); }
int nvmlShutdown(void) { return 0; }
const char *nvmlErrorString(int code) { (void)code; return "an error of the fake"; }
int nvmlSystemGetDriverVersion(char *out, unsigned size) { return text(__func__, "FAKE_NVML_DRIVER", "000.00 FAKE", out, size); }
int nvmlSystemGetNVMLVersion(char *out, unsigned size) { return text(__func__, "FAKE_NVML_VERSION", "0.000.00", out, size); }
int nvmlDeviceGetName(void *d, char *out, unsigned size) { (void)d; return text(__func__, "FAKE_NVML_NAME", "FAKE GPU", out, size); }

int nvmlDeviceGetHandleByUUID(const char *uuid, void **device) {
    *device = &now;
    return strcmp(uuid, UUID) ? 6 : status(__func__);
}

int nvmlDeviceGetMigMode(void *d, unsigned *current, unsigned *pending) {
    (void)d;
    *current = *pending = getenv("FAKE_NVML_MIG") != NULL;
    return status(__func__);
}

int nvmlDeviceGetTotalEnergyConsumption(void *d, unsigned long long *mj) {
    (void)d;
    *mj = (unsigned long long)(1000 * shown_joules);
    return status(__func__);
}

static unsigned power_mw(void) {
    const char *gain = getenv("FAKE_NVML_GAIN");
    return (unsigned)(1000 * shown_watts * (gain ? atof(gain) : 1));
}

int nvmlDeviceGetPowerUsage(void *d, unsigned *mw) { (void)d; *mw = power_mw(); return status(__func__); }
int nvmlDeviceGetEnforcedPowerLimit(void *d, unsigned *mw) { (void)d; *mw = 700000; return status(__func__); }
int nvmlDeviceGetTemperature(void *d, int sensor, unsigned *c) { (void)d; (void)sensor; *c = 40; return status(__func__); }

int nvmlDeviceGetClockInfo(void *d, int type, unsigned *mhz) { (void)d; *mhz = type == 2 ? 2600 : 1500; return status(__func__); }
int nvmlDeviceGetMaxClockInfo(void *d, int type, unsigned *mhz) { (void)d; *mhz = type == 2 ? 2600 : 1980; return status(__func__); }
int nvmlDeviceGetDeviceHandleFromMigDeviceHandle(void *d, void **board) { *board = d; return status(__func__); }

int nvmlDeviceGetComputeRunningProcesses_v3(void *d, unsigned *count, void *infos) {
    (void)d;
    const char *running = getenv("FAKE_NVML_PROCESSES");
    unsigned found = running ? (unsigned)atoi(running) : 0;
    int fits = infos != NULL || found == 0;
    *count = found;
    return fits ? status(__func__) : 7; /* insufficient size */
}

int nvmlDeviceGetCurrentClocksEventReasons(void *d, unsigned long long *mask) {
    (void)d;
    const char *set = getenv("FAKE_NVML_CLOCKS");
    *mask = set ? strtoull(set, 0, 0) : shown_watts > 100 ? 0x4 : 0x1; /* power cap, idle */
    return status(__func__);
}

int nvmlDeviceGetFieldValues(void *d, int count, Field *fields) {
    (void)d;
    for (int i = 0; i < count; i++) {
        fields[i].status = fields[i].field == 186 ? status("field186") : 3;
        fields[i].type = 1;
        fields[i].value.ui = power_mw();
    }
    return status(__func__);
}
