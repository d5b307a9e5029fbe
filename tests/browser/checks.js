// What is wrong with the page as it is laid out now: evaluated in the page with the list of section ids that it must have.
async (sections) => {
  const faults = [];
  const width = document.documentElement.clientWidth;

  const seen = (element) => {
    const box = element.getBoundingClientRect();
    return element.checkVisibility({ opacityProperty: true, visibilityProperty: true }) && box.width > 0 && box.height > 0;
  };

  const scrolls = (element) => {
    for (let parent = element.parentElement; parent && parent !== document.body; parent = parent.parentElement)
      if (["auto", "scroll"].includes(getComputedStyle(parent).overflowX)) return true;
    return false;
  };

  // ---- colours: [red, green, blue, alpha], each 0 to 1

  const brush = Object.assign(document.createElement("canvas"), { width: 1, height: 1 })
    .getContext("2d", { willReadFrequently: true });
  const known = new Map();
  const colour = (css) => {
    if (!known.has(css)) {
      brush.clearRect(0, 0, 1, 1);
      brush.fillStyle = css;
      brush.fillRect(0, 0, 1, 1);
      known.set(css, Array.from(brush.getImageData(0, 0, 1, 1).data, (value) => value / 255));
    }
    return known.get(css);
  };
  const mix = (below, above, alpha) => [0, 1, 2].map((i) => above[i] * alpha + below[i] * (1 - alpha));
  const over = (above, below) => mix(below, above, above[3]);

  const canvas = () => {
    const probe = document.createElement("div");
    probe.style.backgroundColor = "Canvas";
    document.documentElement.append(probe);
    const found = colour(getComputedStyle(probe).backgroundColor);
    probe.remove();
    return found;
  };

  // The colours of a text and of what is behind it, painted from the root inwards; images behind it are not looked at.
  const paint = (chain, backdrop) => {
    const style = getComputedStyle(chain[0]);
    const behind = over(colour(style.backgroundColor), backdrop);
    const inner = chain.length > 1 ? paint(chain.slice(1), behind) : { behind, text: over(colour(style.color), behind) };
    const opacity = Number(style.opacity);
    return { behind: mix(backdrop, inner.behind, opacity), text: mix(backdrop, inner.text, opacity) };
  };

  // WCAG 2: relative luminance and contrast ratio.
  const luminance = (rgb) => {
    const [r, g, b] = rgb.map((value) => (value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const contrast = (element) => {
    const chain = [];
    for (let node = element; node; node = node.parentElement) chain.unshift(node);
    const { behind, text } = paint(chain, page);
    const [low, high] = [luminance(behind), luminance(text)].sort((a, b) => a - b);
    return (high + 0.05) / (low + 0.05);
  };

  // ---- the checks

  document.querySelectorAll("details").forEach((details) => (details.open = true));
  document.querySelectorAll("img").forEach((image) => (image.loading = "eager"));
  await Promise.all(Array.from(document.images, (image) => image.decode().catch(() => {})));
  await document.fonts.ready;
  const page = canvas();

  if (width !== window.screen.width) faults.push(`laid out ${width} px wide on a screen of ${window.screen.width}`);
  const wide = document.documentElement.scrollWidth;
  if (wide > width) faults.push(`the page is ${wide} px wide and overflows`);

  for (const id of sections) {
    const section = document.getElementById(id);
    if (!section) faults.push(`no section #${id}`);
    else if (!seen(section)) faults.push(`section #${id} is not visible`);
  }

  const figures = Array.from(document.querySelectorAll("figure, img, svg")).filter((one) => !one.parentElement.closest("svg"));
  const tables = Array.from(document.querySelectorAll("table"));
  const label = (element) => {
    const number = Array.from(document.querySelectorAll(element.localName)).indexOf(element) + 1;
    return `${element.localName} ${number}${element.id ? ` (#${element.id})` : ""}`;
  };
  for (const element of [...tables, ...figures]) {
    const box = element.getBoundingClientRect();
    if (!seen(element)) faults.push(`${label(element)} is not visible`);
    else if ((box.left < 0 || box.right > width + 1) && !scrolls(element))
      faults.push(`${label(element)} reaches from ${Math.round(box.left)} to ${Math.round(box.right)} px, and nothing scrolls`);
    if (element.localName === "img" && element.naturalWidth === 0) faults.push(`${label(element)} has no picture`);
  }

  const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  const judged = new Set();
  const faint = [];
  while (texts.nextNode()) {
    const element = texts.currentNode.parentElement;
    if (!texts.currentNode.data.trim() || judged.has(element) || element.closest("svg, script, style")) continue;
    judged.add(element);
    if (!seen(element)) continue;
    const ratio = contrast(element);
    if (ratio < 4.5)
      faint.push(`contrast ${ratio.toFixed(2)} of <${element.localName}> “${texts.currentNode.data.trim().slice(0, 40)}”`);
  }
  faults.push(...faint.slice(0, 5));
  if (faint.length > 5) faults.push(`contrast below 4.5 of ${faint.length - 5} texts more`);

  return { faults, tables: tables.length, figures: figures.length, texts: judged.size };
}
