package api

import "context"

// memoryQuery checks the parameters, which the generated code only decodes.
func memoryQuery(mode MemoryMode, pause bool) (MemoryQuery, error) {
	if mode != "" && !mode.Valid() {
		return MemoryQuery{}, badRequest("use quick or full", "mode %.16q is unknown", string(mode))
	}
	return MemoryQuery{Full: mode == MemoryFull, Pause: pause}, nil
}

func (o *operations) GetMemory(ctx context.Context, request GetMemoryRequestObject) (GetMemoryResponseObject, error) {
	q, err := memoryQuery(request.Params.Mode, request.Params.Pause)
	if err != nil {
		return nil, err
	}
	m, err := o.machine.Memory(ctx, q)
	if err != nil {
		return nil, err
	}
	if m.Layers == nil {
		m.Layers = []MemoryLayer{}
	}
	if m.Steps == nil {
		m.Steps = []MemoryStep{}
	}
	if m.Frames.Reasons == nil {
		m.Frames.Reasons = map[string]uint64{}
	}
	if m.Names.Counters == nil {
		m.Names.Counters = map[string]uint64{}
	}
	return GetMemory200JSONResponse(m), nil
}

func (o *operations) GetMemoryMap(ctx context.Context, request GetMemoryMapRequestObject) (GetMemoryMapResponseObject, error) {
	q, err := memoryQuery(request.Params.Mode, request.Params.Pause)
	if err != nil {
		return nil, err
	}
	m, err := o.machine.MemoryMap(ctx, q)
	if err != nil {
		return nil, err
	}
	if m.Regions == nil {
		m.Regions = []MemoryRegion{}
	}
	if m.Classes == nil {
		m.Classes = []MemoryClass{}
	}
	return GetMemoryMap200JSONResponse(m), nil
}

// Memory asks what the guest's memory equals and how it is mapped. A machine that
// was paused for it runs on even when ctx ends first.
func (r *Remote) Memory(ctx context.Context, q MemoryQuery) (Memory, error) {
	response, err := r.client.GetMemoryWithResponse(ctx, &GetMemoryParams{Mode: q.mode(), Pause: q.Pause})
	if err != nil {
		return Memory{}, err
	}
	if response.JSON200 == nil {
		return Memory{}, failure(response.StatusCode(), response.JSONDefault)
	}
	return *response.JSON200, nil
}

// MemoryMap asks the same place by place.
func (r *Remote) MemoryMap(ctx context.Context, q MemoryQuery) (MemoryMap, error) {
	response, err := r.client.GetMemoryMapWithResponse(ctx, &GetMemoryMapParams{Mode: q.mode(), Pause: q.Pause})
	if err != nil {
		return MemoryMap{}, err
	}
	if response.JSON200 == nil {
		return MemoryMap{}, failure(response.StatusCode(), response.JSONDefault)
	}
	return *response.JSON200, nil
}

func (q MemoryQuery) mode() MemoryMode {
	if q.Full {
		return MemoryFull
	}
	return MemoryQuick
}
