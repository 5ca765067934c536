// The slider of a chain cross-fades between the two frames nearest to its alpha, for every method at once.
function startSlider(chain) {
  const slider = chain.querySelector('.fade input');
  const stops = slider.dataset.stops.split(',').map(Number);
  slider.oninput = () => {
    const alpha = Number(slider.value);
    let next = 1;
    while (stops[next] < alpha) next++;
    chain.querySelectorAll('.fade div').forEach((fade) => {
      const row = chain.querySelectorAll(`.strip [data-row="${fade.dataset.row}"], .strip [data-row="all"]`);
      const pictures = Array.from(row).sort((a, b) => a.dataset.at - b.dataset.at);
      fade.children[0].src = pictures[next - 1].src;
      fade.children[1].src = pictures[next].src;
      fade.children[1].style.opacity = (alpha - stops[next - 1]) / (stops[next] - stops[next - 1]);
    });
    chain.querySelector('.fade output').textContent = 'α = ' + alpha.toFixed(2);
  };
  slider.oninput();
}
document.querySelectorAll('.chain').forEach(startSlider);
