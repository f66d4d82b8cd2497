package acpi

import (
	"encoding/binary"
	"fmt"
	"strings"
)

// code is encoded AML (ACPI 6.5, chapter 20). The functions below are its
// constructors, named after the ASL operators; they nest like ASL does.
type code []byte

// Opcodes (ACPI 6.5, 20.3).
const (
	opZero           = 0x00
	opOne            = 0x01
	opName           = 0x08
	opByte           = 0x0a
	opWord           = 0x0b
	opDWord          = 0x0c
	opString         = 0x0d
	opQWord          = 0x0e
	opScope          = 0x10
	opBuffer         = 0x11
	opPackage        = 0x12
	opMethod         = 0x14
	opDualName       = 0x2e
	opMultiName      = 0x2f
	opExt            = 0x5b
	opRoot           = 0x5c
	opLocal0         = 0x60
	opArg0           = 0x68
	opStore          = 0x70
	opAnd            = 0x7b
	opOr             = 0x7d
	opNotify         = 0x86
	opCreateDWord    = 0x8a
	opLNot           = 0x92
	opLEqual         = 0x93
	opIf             = 0xa0
	opReturn         = 0xa4
	extOpRegion      = 0x80
	extField         = 0x81
	extDevice        = 0x82
	regionSystemMem  = 0
	fieldDWord       = 3 // AccessType DWordAcc, no lock
	fieldWriteZeroes = 2 << 5
)

// join concatenates terms.
func join(terms ...code) code {
	var all code
	for _, t := range terms {
		all = append(all, t...)
	}
	return all
}

// packageLength prefixes body with its PkgLength, which counts itself (20.2.4).
func packageLength(body code) code {
	n := len(body)
	var prefix code
	switch {
	case n+1 < 1<<6:
		prefix = code{byte(n + 1)}
	case n+2 < 1<<12:
		n += 2
		prefix = code{1<<6 | byte(n&0xf), byte(n >> 4)}
	case n+3 < 1<<20:
		n += 3
		prefix = code{2<<6 | byte(n&0xf), byte(n >> 4), byte(n >> 12)}
	default:
		n += 4
		prefix = code{3<<6 | byte(n&0xf), byte(n >> 4), byte(n >> 12), byte(n >> 20)}
	}
	return join(prefix, body)
}

// path encodes a NameString such as `\_SB.PCI0` (20.2.2). Segments are padded
// with underscores.
func path(name string) code {
	var c code
	if rest, ok := strings.CutPrefix(name, `\`); ok {
		c, name = append(c, opRoot), rest
	}
	segments := strings.Split(name, ".")
	switch n := len(segments); n {
	case 1:
	case 2:
		c = append(c, opDualName)
	default:
		c = append(c, opMultiName, byte(n))
	}
	for _, s := range segments {
		c = append(c, nameSegment(s)...)
	}
	return c
}

// nameSegment pads a name to four characters. A longer one is a mistake in
// this package, never in its input.
func nameSegment(s string) code {
	if len(s) > 4 {
		panic(fmt.Sprintf("acpi: name segment %q is longer than 4 characters", s))
	}
	return code(s + "____"[len(s):])
}

// integer encodes v in the shortest form (20.2.3).
func integer(v uint64) code {
	le := binary.LittleEndian
	switch {
	case v == 0:
		return code{opZero}
	case v == 1:
		return code{opOne}
	case v < 1<<8:
		return code{opByte, byte(v)}
	case v < 1<<16:
		return le.AppendUint16(code{opWord}, uint16(v))
	case v < 1<<32:
		return le.AppendUint32(code{opDWord}, uint32(v))
	}
	return le.AppendUint64(code{opQWord}, v)
}

func text(s string) code       { return join(code{opString}, code(s), code{0}) }
func local0() code             { return code{opLocal0} }
func arg(n int) code           { return code{opArg0 + byte(n)} }
func store(src, dst code) code { return join(code{opStore}, src, dst) }
func ret(v code) code          { return join(code{opReturn}, v) }

// named is Name (name, value).
func named(name string, value code) code { return join(code{opName}, path(name), value) }

// scope is Scope (name) { body }.
func scope(name string, body ...code) code {
	return join(code{opScope}, packageLength(join(path(name), join(body...))))
}

// device is Device (name) { body }.
func device(name string, body ...code) code {
	return join(code{opExt, extDevice}, packageLength(join(path(name), join(body...))))
}

// method is Method (name, args, Serialized) { body }.
func method(name string, args int, body ...code) code {
	const serialized = 1 << 3
	return join(code{opMethod}, packageLength(join(path(name), code{byte(args) | serialized}, join(body...))))
}

// list is Package (n) { items }.
func list(items ...code) code {
	return join(code{opPackage}, packageLength(join(code{byte(len(items))}, join(items...))))
}

// buffer is Buffer (n) { bytes }.
func buffer(b []byte) code {
	return join(code{opBuffer}, packageLength(join(integer(uint64(len(b))), b)))
}

// when is If (condition) { body }.
func when(condition code, body ...code) code {
	return join(code{opIf}, packageLength(join(condition, join(body...))))
}

// equal is LEqual (a, b).
func equal(a, b code) code { return join(code{opLEqual}, a, b) }

// not is LNot (a).
func not(a code) code { return join(code{opLNot}, a) }

// bitAnd is And (a, b) without a target.
func bitAnd(a, b code) code { return join(code{opAnd}, a, b, code{opZero}) }

// setBits is Or (name, bits, name).
func setBits(name string, bits uint64) code {
	return join(code{opOr}, path(name), integer(bits), path(name))
}

// notify is Notify (object, value).
func notify(object string, value uint64) code {
	return join(code{opNotify}, path(object), integer(value))
}

// createDWordField is CreateDWordField (source, byteIndex, name).
func createDWordField(source code, byteIndex uint64, name string) code {
	return join(code{opCreateDWord}, source, integer(byteIndex), path(name))
}

// memoryField is an OperationRegion of SystemMemory with one 32-bit field
// over it.
func memoryField(region string, at uint64, field string) code {
	const sizeBytes, sizeBits = 4, 32
	return join(
		code{opExt, extOpRegion}, path(region), code{regionSystemMem}, integer(at), integer(sizeBytes),
		code{opExt, extField}, packageLength(join(
			path(region), code{fieldDWord | fieldWriteZeroes}, nameSegment(field), code{sizeBits})),
	)
}

// eisaID encodes an EISA identifier such as PNP0A08 as an integer (ASL EISAID,
// ACPI 6.5, 19.6.36).
func eisaID(id string) code {
	v := uint32(id[0]-0x40)<<26 | uint32(id[1]-0x40)<<21 | uint32(id[2]-0x40)<<16
	for i, c := range id[3:7] {
		digit := uint32(strings.IndexRune("0123456789ABCDEF", c))
		v |= digit << (12 - 4*i)
	}
	return binary.BigEndian.AppendUint32(code{opDWord}, v)
}
