import sys, time, torch, statistics as st
from reattend.codegen.calibrate import _attention, ready
import reattend.codegen.calibrate as cal
from reattend.patterns.mapping import Mapping
from torch.nn.functional import scaled_dot_product_attention as sdpa
cal.WINDOW=256
torch.manual_seed(0)
for n in (4096,):
  for t in ("bf16","f32"):
    for mask in ("window","causal"):
      c,x,sizes=_attention(mask,t,1,8,n)
      c=c.with_sizes({"E":64,"F":64,"H":8}); runs={}
      for m in (Mapping(128,128,body="sdpa"),Mapping(32,32,body="fused"),Mapping(64,64,body="fused"),Mapping(64,32,body="fused")):
        runs[f"{m.body} {m.tile_p}x{m.tile_m}"]=ready(c,m,x,sizes)
      at=torch.arange(n); kept=(at[:,None]>=at)&((at[:,None]-at)<(256 if mask=="window" else n))
      runs["sdpa+mask"]=lambda: sdpa(x["Q"],x["K"],x["V"],attn_mask=kept)
      if mask=="causal": runs["sdpa causal"]=lambda: sdpa(x["Q"],x["K"],x["V"],is_causal=True)
      for th in (1,2):
        torch.set_num_threads(th)
        T={k:[] for k in runs}
        ref=None
        with torch.no_grad():
          for i in range(7):
            for k,f in runs.items():
              s=time.perf_counter(); o=f(); T[k].append(time.perf_counter()-s)
              if i==0:
                ref = o if ref is None else ref
                d=(o.float()-ref.float()).abs().max().item()
                if d>0.02: print("DIFF",k,d)
        print(n,t,mask,th,{k:round(1e3*st.median(v),2) for k,v in T.items()},flush=True)
