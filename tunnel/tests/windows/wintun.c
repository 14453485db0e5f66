/*
 * A stand-in for wintun.dll, for machines without its driver: one adapter whose rings are
 * joined, so that what a program sends is what it receives next.
 *
 *     x86_64-w64-mingw32-gcc -shared -O2 -Wall -Wextra -Werror -o wintun.dll wintun.c
 *
 * It keeps wintun's rules (wintun.h 0.14) where a program could break them: places are sent
 * in the order in which they were allocated, and given back in any; one that is held back
 * holds up what comes after it. The ring has 64 places. A packet of 13 bytes removes the
 * adapter: from then on both ends are told that it is gone.
 */
#include <stddef.h>

#include <windows.h>

enum { PLACES = 64, LONGEST = 65535, REMOVES = 13 };
enum { FREE, ALLOCATED, SENT, TAKEN };

struct place {
	int state;
	DWORD size;
	BYTE bytes[LONGEST];
};

static struct {
	CRITICAL_SECTION lock;
	HANDLE ready;
	struct place places[PLACES];
	unsigned allocated, taken; /* places of the next of each */
	BOOL removed;
} ring;

static struct place *of(const BYTE *bytes)
{
	return (struct place *)(bytes - offsetof(struct place, bytes));
}

BOOL WINAPI DllMain(HINSTANCE self, DWORD why, void *reserved)
{
	(void)self, (void)reserved;
	if (why == DLL_PROCESS_ATTACH)
		InitializeCriticalSection(&ring.lock);
	return TRUE;
}

__declspec(dllexport) void *WINAPI WintunCreateAdapter(const WCHAR *name, const WCHAR *type,
						       const GUID *guid)
{
	(void)name, (void)type, (void)guid;
	return &ring;
}

__declspec(dllexport) void *WINAPI WintunOpenAdapter(const WCHAR *name)
{
	(void)name;
	SetLastError(ERROR_NOT_FOUND);
	return NULL;
}

__declspec(dllexport) void WINAPI WintunCloseAdapter(void *adapter) { (void)adapter; }

__declspec(dllexport) void WINAPI WintunGetAdapterLUID(void *adapter, ULONGLONG *luid)
{
	(void)adapter;
	*luid = 0;
}

__declspec(dllexport) BOOL WINAPI WintunDeleteDriver(void) { return TRUE; }

__declspec(dllexport) DWORD WINAPI WintunGetRunningDriverVersion(void) { return 0x0e; }

__declspec(dllexport) void WINAPI WintunSetLogger(void *logger) { (void)logger; }

__declspec(dllexport) void *WINAPI WintunStartSession(void *adapter, DWORD capacity)
{
	/* The real one refuses others, too. */
	if (capacity < 0x20000 || capacity > 0x4000000 || (capacity & (capacity - 1))) {
		SetLastError(ERROR_INVALID_PARAMETER);
		return NULL;
	}
	ring.ready = CreateEventW(NULL, FALSE, FALSE, NULL);
	ring.allocated = ring.taken = 0;
	ring.removed = FALSE;
	for (int i = 0; i < PLACES; i++)
		ring.places[i].state = FREE;
	return adapter;
}

__declspec(dllexport) void WINAPI WintunEndSession(void *session)
{
	(void)session;
	CloseHandle(ring.ready);
}

__declspec(dllexport) HANDLE WINAPI WintunGetReadWaitEvent(void *session)
{
	(void)session;
	return ring.ready;
}

__declspec(dllexport) BYTE *WINAPI WintunReceivePacket(void *session, DWORD *size)
{
	(void)session;
	BYTE *bytes = NULL;
	DWORD error = ERROR_NO_MORE_ITEMS;
	EnterCriticalSection(&ring.lock);
	struct place *place = &ring.places[ring.taken % PLACES];
	if (ring.removed) {
		error = ERROR_HANDLE_EOF;
	} else if (place->state == SENT) {
		place->state = TAKEN;
		ring.taken++;
		*size = place->size;
		bytes = place->bytes;
	}
	LeaveCriticalSection(&ring.lock);
	SetLastError(bytes ? ERROR_SUCCESS : error);
	return bytes;
}

__declspec(dllexport) void WINAPI WintunReleaseReceivePacket(void *session, const BYTE *bytes)
{
	(void)session;
	EnterCriticalSection(&ring.lock);
	of(bytes)->state = FREE;
	LeaveCriticalSection(&ring.lock);
}

__declspec(dllexport) BYTE *WINAPI WintunAllocateSendPacket(void *session, DWORD size)
{
	(void)session;
	BYTE *bytes = NULL;
	DWORD error = ERROR_BUFFER_OVERFLOW;
	EnterCriticalSection(&ring.lock);
	struct place *place = &ring.places[ring.allocated % PLACES];
	if (ring.removed) {
		error = ERROR_HANDLE_EOF;
	} else if (place->state == FREE && size <= LONGEST) {
		place->state = ALLOCATED;
		place->size = size;
		ring.allocated++;
		bytes = place->bytes;
	}
	LeaveCriticalSection(&ring.lock);
	SetLastError(bytes ? ERROR_SUCCESS : error);
	return bytes;
}

__declspec(dllexport) void WINAPI WintunSendPacket(void *session, const BYTE *bytes)
{
	(void)session;
	EnterCriticalSection(&ring.lock);
	of(bytes)->state = SENT;
	ring.removed |= of(bytes)->size == REMOVES;
	LeaveCriticalSection(&ring.lock);
	SetEvent(ring.ready);
}
