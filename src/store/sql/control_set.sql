-- Sets a setting of the cluster, inside a change.
-- $1 its name, $2 its value
insert into shardmq_control.setting as s (name, value) values ($1, $2)
on conflict (name) do update set value = excluded.value where s.value <> excluded.value
