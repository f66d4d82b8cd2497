// Package serial is a 16550A UART with FIFOs (National Semiconductor PC16550D
// data sheet), complete enough for Linux's 8250 driver, earlyprintk and kdb,
// and for firmware that polls.
//
//	guest --THR--> transmit buffer --goroutine--> Config.Output
//	guest <--RBR-- receive FIFO (16) <----------- WriteInput
//
// The line speed is not emulated: a byte is on its way as soon as it is
// written. The transmit buffer is longer than the data sheet's 16 bytes; while
// Output does not keep up and the buffer is full, LSR says that the transmitter
// is busy and a guest that writes anyway loses that byte, which is counted. A
// vCPU never waits for Output.
//
// Ownership: [New] starts the goroutine that writes to Output and [Close] ends
// and joins it after what was sent has been written.
package serial
