"""Tiny synthetic COCO + VOC trees in the layout DeFRCN/TFA expect, written under ./datasets.
Needs numpy + Pillow.  Deterministic; images are PNG content behind .jpg names."""
import os, json, sys, numpy as np, random
sys.path.insert(0, os.path.dirname(os.path.abspath(__file__))); import defrcn_rules as G
from PIL import Image
def save(path, bgr):   # PNG content whatever the extension: lossless, PIL and cv2 both sniff the content
    Image.fromarray(np.ascontiguousarray(bgr[:, :, ::-1])).save(open(path, "wb"), format="PNG")
NOVEL = [1,2,3,4,5,6,7,9,16,17,18,19,20,21,44,62,63,64,67,72]
ID2 = {1: 'person', 2: 'bicycle', 3: 'car', 4: 'motorcycle', 5: 'airplane', 6: 'bus', 7: 'train', 8: 'truck', 9: 'boat', 10: 'traffic light', 11: 'fire hydrant', 13: 'stop sign', 14: 'parking meter', 15: 'bench', 16: 'bird', 17: 'cat', 18: 'dog', 19: 'horse', 20: 'sheep', 21: 'cow', 22: 'elephant', 23: 'bear', 24: 'zebra', 25: 'giraffe', 27: 'backpack', 28: 'umbrella', 31: 'handbag', 32: 'tie', 33: 'suitcase', 34: 'frisbee', 35: 'skis', 36: 'snowboard', 37: 'sports ball', 38: 'kite', 39: 'baseball bat', 40: 'baseball glove', 41: 'skateboard', 42: 'surfboard', 43: 'tennis racket', 44: 'bottle', 46: 'wine glass', 47: 'cup', 48: 'fork', 49: 'knife', 50: 'spoon', 51: 'bowl', 52: 'banana', 53: 'apple', 54: 'sandwich', 55: 'orange', 56: 'broccoli', 57: 'carrot', 58: 'hot dog', 59: 'pizza', 60: 'donut', 61: 'cake', 62: 'chair', 63: 'couch', 64: 'potted plant', 65: 'bed', 67: 'dining table', 70: 'toilet', 72: 'tv', 73: 'laptop', 74: 'mouse', 75: 'remote', 76: 'keyboard', 77: 'cell phone', 78: 'microwave', 79: 'oven', 80: 'toaster', 81: 'sink', 82: 'refrigerator', 84: 'book', 85: 'clock', 86: 'vase', 87: 'scissors', 88: 'teddy bear', 89: 'hair drier', 90: 'toothbrush'}
ids = sorted(ID2)
def coco():
    os.makedirs("datasets/coco/trainval2014", exist_ok=True); os.makedirs("datasets/coco/val2014", exist_ok=True); os.makedirs("datasets/cocosplit/datasplit", exist_ok=True)
    cats = [dict(id=i, name=ID2[i], supercategory="x") for i in ids]
    def make(n, sub, prefix, start):
        imgs, anns = [], []
        for k in range(n):
            r = G.rng("coco_%s_%d" % (prefix, k)); h, w = (96, 128) if k % 3 else (128, 96)
            fn = "%s_%012d.jpg" % (prefix, start + k)
            im = G.image("coco_%s_%d" % (prefix, k), h, w)
            imgs.append(dict(id=start + k, file_name=fn, height=h, width=w))
            for j in range(4):
                bw, bh = r.randint(16, 60), r.randint(16, 60); x, y = r.randint(0, w - bw), r.randint(0, h - bh)
                c = ids[(k * 3 + j) % 80] if j < 3 else ids[r.randint(80)]
                col = [int((c * m) % 256) for m in (37, 91, 173)]
                im[y:y + bh, x:x + bw] = col
                anns.append(dict(id=start * 100 + len(anns) + 1, image_id=start + k, category_id=c, bbox=[float(x) + 0.25, float(y) + 0.5, float(bw), float(bh)], area=int(bw * bh), iscrowd=int(j == 3 and k % 7 == 0)))
            save("datasets/coco/%s/%s" % (sub, fn), im)
        return dict(info={}, licenses=[], images=imgs, annotations=anns, categories=cats)
    tr = make(60, "trainval2014", "COCO_trainval2014", 1000); te = make(8, "val2014", "COCO_val2014", 5000)
    json.dump(tr, open("datasets/cocosplit/datasplit/trainvalno5k.json", "w")); json.dump(te, open("datasets/cocosplit/datasplit/5k.json", "w"))
    for seed in (0,):
        os.makedirs("datasets/cocosplit/seed%d" % seed, exist_ok=True)
        for c in ids:
            pick, done = [], set()
            for a in tr["annotations"]:
                if a["category_id"] == c and not a["iscrowd"] and a["image_id"] not in done:
                    pick.append(a); done.add(a["image_id"])
            for shot in (1, 2):
                p = pick[:shot]
                json.dump(dict(info={}, licenses=[], images=[i for i in tr["images"] if i["id"] in [a["image_id"] for a in p]], annotations=p, categories=cats),
                          open("datasets/cocosplit/seed%d/full_box_%dshot_%s_trainval.json" % (seed, shot, ID2[c]), "w"))
VOC = ['aeroplane','bicycle','bird','boat','bottle','bus','car','cat','chair','cow','diningtable','dog','horse','motorbike','person','pottedplant','sheep','sofa','train','tvmonitor']
def voc():
    for year, n in ((2007, 30), (2012, 10)):
        d = "datasets/VOC%d" % year
        for s in ("Annotations", "JPEGImages", "ImageSets/Main"): os.makedirs(os.path.join(d, s), exist_ok=True)
        names = []
        for k in range(n):
            fid = "%06d" % k if year == 2007 else "2012_%06d" % k
            names.append(fid); r = G.rng("voc_%s" % fid); h, w = (90, 120); im = G.image("voc_" + fid, h, w); objs = ""
            for j in range(3):
                bw, bh = r.randint(16, 50), r.randint(16, 50); x, y = r.randint(1, w - bw), r.randint(1, h - bh); c = VOC[(k + j * 7) % 20] if j < 2 else VOC[(k) % 20]
                im[y:y + bh, x:x + bw] = [int((VOC.index(c) * m) % 256) for m in (37, 91, 173)]
                objs += "<object><name>%s</name><pose>x</pose><truncated>0</truncated><difficult>%d</difficult><bndbox><xmin>%d</xmin><ymin>%d</ymin><xmax>%d</xmax><ymax>%d</ymax></bndbox></object>" % (c, int((k + j) % 5 == 4), x, y, x + bw, y + bh)
            open("%s/Annotations/%s.xml" % (d, fid), "w").write("<annotation><folder>VOC%d</folder><filename>%s.jpg</filename><size><width>%d</width><height>%d</height><depth>3</depth></size>%s</annotation>" % (year, fid, w, h, objs))
            save("%s/JPEGImages/%s.jpg" % (d, fid), im)
        open(d + "/ImageSets/Main/trainval.txt", "w").write("\n".join(names[: int(n * .8)]) + "\n"); open(d + "/ImageSets/Main/test.txt", "w").write("\n".join(names[int(n * .8):]) + "\n")
    os.makedirs("datasets/vocsplit/seed0", exist_ok=True)
    import xml.etree.ElementTree as ET
    per = {c: [] for c in VOC}
    for year in (2007, 2012):
        for fid in open("datasets/VOC%d/ImageSets/Main/trainval.txt" % year).read().split():
            for c in sorted({o.find("name").text for o in ET.parse("datasets/VOC%d/Annotations/%s.xml" % (year, fid)).findall("object")}):
                per[c].append("datasets/VOC%d/JPEGImages/%s.jpg" % (year, fid))
    for c in VOC:
        for shot in (1, 2):
            open("datasets/vocsplit/seed0/box_%dshot_%s_train.txt" % (shot, c), "w").write("\n".join(per[c][:shot]) + "\n")
coco(); voc()
