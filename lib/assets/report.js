// Draws the charts of report.html from the JSON in #data. Runs in the browser, from file:// too; uPlot is inlined before it.
(() => {
  const data = JSON.parse(document.getElementById('data').textContent);
  const color = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const seriesColor = (i) => color(`--series-${(i % 7) + 1}`);

  const short = (value) => {
    if (value === null || value === undefined) return '–';
    const size = Math.abs(value);
    if (size !== 0 && (size < 1e-3 || size >= 1e5)) return value.toExponential(2);
    return String(Number(value.toPrecision(4)));
  };

  const axis = (extra) => ({
    stroke: color('--muted'),
    grid: { stroke: color('--grid'), width: 1 },
    ticks: { stroke: color('--grid'), width: 1 },
    font: '12px system-ui, sans-serif',
    ...extra,
  });

  // Exponents are labelled at powers of ten only, at most about six of them.
  const logTicks = (_, splits) => {
    const powers = splits.filter((value) => value !== null && Math.abs(Math.log10(value) % 1) < 1e-6);
    const every = Math.max(1, Math.ceil(powers.length / 6));
    const labelled = new Set(powers.length > 1 ? powers.filter((_, i) => i % every === 0) : splits);
    return splits.map((value) => (labelled.has(value) ? short(value) : ''));
  };

  // A log axis goes from power of ten to power of ten, so that its labels are round.
  const logRange = (_, low, high) => {
    if (!(low > 0) || !(high > 0)) return [0.1, 10];
    const from = Math.floor(Math.log10(low) + 1e-9);
    const to = Math.ceil(Math.log10(high) - 1e-9);
    return [10 ** from, 10 ** Math.max(to, from + 1)];
  };

  const charts = [];

  function chart(spec) {
    const place = document.getElementById(spec.id);
    if (!place) return;
    const make = () => {
      const options = {
        width: place.clientWidth,
        height: spec.height ?? 230,
        cursor: { sync: spec.sync ? { key: spec.sync } : undefined, drag: { x: true, y: false } },
        legend: { live: true },
        scales: { x: { time: false, range: spec.xRange }, y: spec.log ? { distr: 3, range: logRange } : {} },
        axes: [axis(spec.xAxis), axis({ size: 64, values: spec.log ? logTicks : (_, splits) => splits.map(short) })],
        series: [{ label: spec.xLabel, value: (_, v) => (v === null ? '–' : String(v)) }, ...spec.series()],
      };
      return new uPlot(options, spec.values, place);
    };
    charts.push({ place, make, plot: make() });
  }

  function rebuild() {
    for (const entry of charts) {
      entry.plot.destroy();
      entry.plot = entry.make();
    }
  }

  const line = (label, stroke, extra) => ({
    label,
    stroke,
    width: 1.6,
    spanGaps: true,
    value: (_, v) => short(v),
    ...extra,
  });
  const { steps, evaluations } = data;

  // Steps and evaluations share one x axis: their sorted union.
  const at = [...new Set([...steps.step, ...evaluations.step])].sort((a, b) => a - b);
  const align = (xs, ys) => {
    const found = new Map(xs.map((x, i) => [x, ys[i]]));
    return at.map((x) => found.get(x) ?? null);
  };
  const few = steps.step.length < 60;

  chart({
    id: 'loss',
    height: 320,
    sync: 'steps',
    xLabel: 'step',
    values: [
      at,
      align(steps.step, steps.loss),
      align(steps.step, steps.smoothLoss),
      align(evaluations.step, evaluations.loss),
    ],
    series: () => [
      line('training loss', color('--faint'), { width: 1, points: { show: false } }),
      line('training loss, smoothed', seriesColor(0), { width: 2, points: { show: false } }),
      line('held-out loss', seriesColor(1), { width: 2, points: { show: true, size: 7, fill: seriesColor(1) } }),
    ],
  });
  for (const [id, label, slot, log] of [
    ['learningRate', 'learning rate', 2, false],
    ['gradNorm', 'gradient norm', 3, true],
    ['tokensPerSecond', 'tokens/s', 5, false],
  ]) {
    const values = log ? steps[id].map((value) => (value > 0 ? value : null)) : steps[id];
    chart({
      id,
      sync: 'steps',
      xLabel: 'step',
      log,
      values: [steps.step, values],
      series: () => [line(label, seriesColor(slot), { points: { show: few } })],
    });
  }

  for (const id of ['conditionNumber', 'medianOutputOverDamping', 'sigma', 'relativeGap']) {
    const { layers, names, figures } = data.modules;
    const rows = figures[id];
    if (!rows || rows.every((row) => row.every((value) => value === null))) continue;
    chart({
      id,
      log: true,
      xLabel: 'layer',
      xRange: (_, low, high) => [low - 0.3, high + 0.3],
      xAxis: { incrs: [1, 2, 4, 5, 8, 10, 20] },
      values: [layers, ...rows.map((row) => row.map((value) => (value > 0 ? value : null)))],
      series: () =>
        names.map((name, i) => line(name, seriesColor(i), { points: { show: layers.length < 60, size: 5 } })),
    });
  }

  let pending;
  addEventListener('resize', () => {
    clearTimeout(pending);
    pending = setTimeout(() => {
      for (const { plot, place } of charts) plot.setSize({ width: place.clientWidth, height: plot.height });
    }, 80);
  });
  matchMedia('(prefers-color-scheme: dark)').addEventListener('change', rebuild);
})();
