-- Which of these backends are still at work, or can't be seen.
-- $1 int[]: pids
select pid from pg_stat_activity where pid = any ($1::int[]) and state is distinct from 'idle'
