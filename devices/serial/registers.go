package serial

// Register offsets (PC16550D, table II). Several depend on the direction or on
// the divisor latch access bit of LCR.
const (
	regData = 0 // RBR, THR; divisor low with DLAB
	regIER  = 1 // interrupt enable; divisor high with DLAB
	regIIR  = 2 // interrupt identification; FCR when written
	regLCR  = 3
	regMCR  = 4
	regLSR  = 5
	regMSR  = 6
	regSCR  = 7
)

// Interrupt enable bits.
const (
	ierReceive  = 1 << 0
	ierTransmit = 1 << 1
	ierLine     = 1 << 2
	ierModem    = 1 << 3
	ierMask     = 0x0f
)

// Interrupt identification, highest priority first, and the FIFO bits.
const (
	iirLine     = 0x06
	iirReceive  = 0x04
	iirTimeout  = 0x0c // bytes below the trigger level, and no more follow
	iirTransmit = 0x02
	iirModem    = 0x00
	iirNone     = 0x01
	iirFIFO     = 0xc0
)

// FIFO control bits.
const (
	fcrEnable       = 1 << 0
	fcrClearReceive = 1 << 1
	fcrTriggerShift = 6
	fcrKept         = 0xc9 // trigger level, DMA mode and enable
)

// triggerLevels are the receive FIFO levels that interrupt.
var triggerLevels = [4]int{1, 4, 8, 14}

const lcrDLAB = 1 << 7

// Modem control bits.
const (
	mcrDTR  = 1 << 0
	mcrRTS  = 1 << 1
	mcrOUT1 = 1 << 2
	mcrOUT2 = 1 << 3
	mcrLoop = 1 << 4
	mcrMask = 0x1f
)

// Line status bits.
const (
	lsrDataReady   = 1 << 0
	lsrOverrun     = 1 << 1
	lsrBreak       = 1 << 4
	lsrHoldEmpty   = 1 << 5
	lsrEmpty       = 1 << 6
	lsrFIFOError   = 1 << 7
	lsrErrors      = lsrOverrun | lsrBreak
	lsrTransmitter = lsrHoldEmpty | lsrEmpty
)

// Modem status bits. The low four say which of the high four changed.
const (
	msrCTS          = 1 << 4
	msrDSR          = 1 << 5
	msrRI           = 1 << 6
	msrDCD          = 1 << 7
	msrDeltaMask    = 0x0f
	msrLinesShift   = 4
	msrAlwaysOnline = msrCTS | msrDSR | msrDCD // what is plugged in
)

const (
	fifoSize = 16
	// resetDivisor is 9600 baud, what firmware leaves behind.
	resetDivisor = 12
)
