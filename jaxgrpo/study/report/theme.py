"""The report's style sheet: two colour themes, type, and what the classes of charts look like.

Blue, vermilion and green are those of Okabe and Ito, told apart by every common colour vision; the
heat maps' blue to orange likewise. Text has a contrast of 4.5 or more against its ground.
"""

_LIGHT = """
--ground:#fcfcfa;--ink:#1d2024;--soft:#5a616b;--rule:#d8dad6;--faint:#e9eae6;--panel:#f6f6f3;
--c0:#33373d;--c1:#0067a5;--c2:#c24e00;--c3:#007a58;--bar:#7d9bb5;--seen:#e4e6e1;--grey:#a9aeb4;
--d0:#084a86;--d1:#3b78b0;--d2:#74a3cd;--d3:#a9c7e2;--d4:#d6e4ef;--d5:#f1f0eb;
--d6:#fbe0cb;--d7:#f6bd92;--d8:#e8935a;--d9:#c9662a;--d10:#8f3f0e;
"""
_DARK = """
--ground:#15171a;--ink:#e9eaec;--soft:#a3aab3;--rule:#3a3f45;--faint:#2a2e33;--panel:#1b1e22;
--c0:#d5d9de;--c1:#62b6f0;--c2:#f59a60;--c3:#4acb9f;--bar:#5f83a3;--seen:#2b2f35;--grey:#6d757e;
--d0:#a5d4ff;--d1:#6db1ef;--d2:#4088c6;--d3:#2b618f;--d4:#22425e;--d5:#282b2f;
--d6:#553a26;--d7:#87522c;--d8:#ba6f37;--d9:#e8965e;--d10:#ffc8a1;
"""

_PAGE = """
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%;text-size-adjust:100%;scroll-behavior:smooth}
body{margin:0;background:var(--ground);color:var(--ink);font:17px/1.6 system-ui,-apple-system,
"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif;overflow-wrap:break-word}
main{max-width:1000px;margin:0 auto;padding:56px 20px 96px}
p,ul,h1,h2,figcaption{max-width:70ch}
h1{font-size:21px;line-height:1.45;font-weight:400;color:var(--soft);margin:0 0 40px}
.topic{font-size:13px;letter-spacing:.04em;color:var(--soft);margin:0 0 6px}
.answer{font-size:34px;line-height:1.22;font-weight:650;letter-spacing:-.015em;margin:0 0 14px;
max-width:26em;text-wrap:balance}
.answer.second{font-size:24px;line-height:1.3}
.answer.long{font-size:25px;line-height:1.3}
.verdict{margin:0 0 36px}
.verdict p:not(.answer):not(.topic){margin:0 0 8px;color:var(--soft);font-size:16px}
.keys{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));gap:20px 28px;
margin:44px 0 0;padding:22px 0;border-top:1px solid var(--rule);border-bottom:1px solid var(--rule)}
.keys div{display:flex;flex-direction:column;justify-content:space-between;min-width:0}
.keys dt{font-size:13px;line-height:1.4;color:var(--soft)}
.keys dd{margin:4px 0 0;font-size:20px;font-variant-numeric:tabular-nums}
nav{margin:22px 0 0;font-size:14px}
nav ol{list-style:none;display:flex;flex-wrap:wrap;gap:4px 22px;margin:0;padding:0}
a{color:var(--c1);text-underline-offset:3px;text-decoration-thickness:1px}
section{margin:88px 0 0}
h2{font-size:26px;line-height:1.25;letter-spacing:-.01em;margin:0 0 14px}
h3{font-size:17px;line-height:1.4;margin:0 0 10px;font-weight:650}
h3 span{font-weight:400;color:var(--soft);margin-right:.45em}
h2+p{margin-top:0}
figure{margin:46px 0 0;min-width:0}
figcaption{font-size:15px;line-height:1.5;color:var(--soft);margin:12px 0 0}
.legend{list-style:none;display:flex;flex-wrap:wrap;gap:4px 20px;margin:0 0 14px;padding:0;
font-size:13px;line-height:1.5;color:var(--soft);max-width:none}
.legend li{display:flex;align-items:center;gap:7px}
.legend svg{flex:none}
.scale{display:flex;flex-wrap:wrap;align-items:center;gap:4px 10px;margin:0 0 14px;font-size:13px;
color:var(--soft);max-width:none}
.scale svg{width:176px;height:14px;flex:none}
.chart svg{display:block;width:100%;height:auto}
.narrow,.middle{display:none}
@media(max-width:899px){.wide{display:none}.middle{display:block}}
@media(max-width:559px){.middle{display:none}.narrow{display:block}
body{font-size:16px}main{padding-top:32px}h1{font-size:18px;margin-bottom:32px}
.answer{font-size:27px}.answer.second,.answer.long{font-size:21px}
section{margin-top:68px}h2{font-size:23px}
.keys{grid-template-columns:1fr 1fr}}
.absent{margin:0;padding:22px 18px;border:1px dashed var(--rule);color:var(--soft);font-size:15px;
max-width:none}
.scroll{overflow-x:auto;margin:28px 0 0;max-width:100%}
.scroll:focus-visible,a:focus-visible,summary:focus-visible{outline:2px solid var(--c1);
outline-offset:2px}
table{border-collapse:collapse;font-size:13.5px;line-height:1.4;font-variant-numeric:tabular-nums}
caption{text-align:left;font-weight:650;font-size:15px;padding:0 0 8px}
th,td{padding:7px 13px 7px 0;text-align:right;white-space:nowrap;vertical-align:top;
border-bottom:1px solid var(--faint)}
thead th{font-weight:400;color:var(--soft);border-bottom:1px solid var(--rule);
vertical-align:bottom;white-space:normal;min-width:5.5em}
.text{text-align:left}
tbody th{font-weight:400}
td:last-child,th:last-child{padding-right:2px}
.wraps td,.wraps tbody th{white-space:normal;overflow-wrap:anywhere}
.wraps{width:100%}
.wraps tbody th{min-width:7.5em}
.wraps td{min-width:6em}
.pairs tbody th{width:12em}
.missing{color:var(--soft)}
details{margin:14px 0 0;font-size:15px}
summary{cursor:pointer;color:var(--soft);width:fit-content}
details .scroll{margin-top:10px}
.note{font-size:14px;color:var(--soft);margin:10px 0 0}
footer{margin:96px 0 0;padding:16px 0 0;border-top:1px solid var(--rule);font-size:14px;
color:var(--soft)}
"""

_CHARTS = """
svg text{font-size:12px;fill:var(--ink);font-variant-numeric:tabular-nums}
svg .tick{font-size:11px;fill:var(--soft)}
svg .label{fill:var(--soft)}
svg .panel-title{font-size:12.5px;font-weight:650}
svg .rule{fill:var(--c)}
svg .row-note{fill:var(--soft)}
.c0{--c:var(--c0)}.c1{--c:var(--c1)}.c2{--c:var(--c2)}.c3{--c:var(--c3)}
.plot{fill:none}
.grid{stroke:var(--faint)}
.axis{stroke:var(--grey)}
.reference{stroke:var(--soft);stroke-dasharray:4 3}
.base{stroke:var(--soft);stroke-dasharray:1.5 3;stroke-width:1.5}
.unseen{fill:var(--seen)}
.whisker{stroke:var(--c);fill:none;stroke-width:1.6}
.mark{fill:var(--c);stroke:var(--ground);stroke-width:1}
.seed{stroke:var(--c);stroke-width:1.4;opacity:.75}
.predicted{stroke:var(--ink);stroke-width:1.6;fill:none}
path.predicted,.legend line.predicted[y1="7"]{stroke-dasharray:5 4}
.fit{stroke:var(--ink);stroke-width:2;fill:none}
.dots{stroke:var(--c);stroke-linecap:round;stroke-width:4.5;fill:none;opacity:.55}
.dots.large{stroke-width:6;opacity:.75}
.band{fill:var(--c);opacity:.16}
.curve{stroke:var(--c);stroke-width:1.7;fill:none;stroke-linejoin:round}
.behind{stroke:var(--grey);stroke-width:1.5;fill:none;stroke-linejoin:round}
.bar{fill:var(--bar)}
.heat{shape-rendering:crispEdges}
.no-data{fill:var(--rule)}
"""


def style_sheet() -> str:
    """Everything between <style> and </style>; holds no character that XML would not allow."""
    levels = "".join(f".d{level}{{fill:var(--d{level})}}" for level in range(11))
    themes = (
        f":root{{color-scheme:light dark;{_LIGHT}}}"
        f"@media(prefers-color-scheme:dark){{:root{{{_DARK}}}}}"
        # Ink on paper, whatever the screen showed.
        f"@media print{{:root{{{_LIGHT}}}section{{margin-top:40px}}figure{{break-inside:avoid}}}}"
    )
    return themes + _PAGE + _CHARTS + levels
